"""What real folders carry: faults met in the field, each as a small builder, with the value that is right.

A new report is a builder of a few lines here and one expectation.
"""
