"""What a reader sees of the records: one HTML page, Markdown, plots and tables."""
