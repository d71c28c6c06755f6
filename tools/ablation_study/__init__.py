"""What each part of S4M adds on toyscapes: the runs, their results, and the report on them."""
