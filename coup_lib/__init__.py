"""The executable version of COUP (arXiv 2408.05900): purifiers, their exact gradients, their evaluation."""
