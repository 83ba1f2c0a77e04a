"""What the parts of a running service are called on the cluster."""

APPLICATION = "afterclick"
DEPLOYMENT = "Recommendations"
NAMESPACE = "afterclick"  # of the actors
AGGREGATOR = "aggregator"
LEARNER = "learner"
EXPERIMENTS = "experiments"
