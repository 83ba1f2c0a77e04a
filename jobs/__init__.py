"""What is submitted and what a person types: one file a job."""

from cluster.local import prepare_environment

prepare_environment()  # before any job imports ray, which reads its settings then
