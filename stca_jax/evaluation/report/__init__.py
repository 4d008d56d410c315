"""One page about one or more runs: runs (what they hold), charts, drawing, page."""
