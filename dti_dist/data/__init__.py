"""From raw event logs to packs: prepared data sets, item tokens, samples, packing, the stream."""
