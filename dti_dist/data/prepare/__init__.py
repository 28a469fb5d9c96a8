"""Turn raw event logs into a prepared data set (:mod:`dti_dist.data.dataset`)."""
