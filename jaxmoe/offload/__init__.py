"""What decides over time which experts are on the device: traces of routing, their replay, and the bounds that they set."""
