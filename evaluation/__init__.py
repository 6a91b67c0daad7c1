"""What evaluate.py measures and writes: metrics of explanations, parts, report, submission."""
