"""Steps that sinkhorn and alignment_loss share: sums over rows and columns of a score matrix in the log domain, in bits."""
