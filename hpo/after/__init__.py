"""What is done with a model after its training: doubt measured, layers folded, weights pruned, fewer bits, other formats."""
