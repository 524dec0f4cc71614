"""What two-stage attention keeps of a model's accuracy, and on which tasks that is measured."""
