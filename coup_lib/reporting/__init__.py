"""The paper's numbers, and the look of figures and tables."""
