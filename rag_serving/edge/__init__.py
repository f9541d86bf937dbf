"""What stands between the network and a request's phases: order at the edge, keys, limits, replies and refusals."""
