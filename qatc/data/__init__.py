"""What is trained on: the corpus that the teacher writes."""
