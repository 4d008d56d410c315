"""The comparison of sequence modules: what is compared, what it costs, and tables of its runs."""
