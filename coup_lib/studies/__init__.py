"""One module for each notebook: what it attacks, and what it shows."""
