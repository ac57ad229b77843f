"""What is told: the plan, the estimate, the report."""
