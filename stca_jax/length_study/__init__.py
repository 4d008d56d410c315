"""The length study: its points, and the tables and figures that its runs make."""
