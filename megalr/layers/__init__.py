"""Building blocks of the decoder: linear layers dense or factorized, head with loss."""
