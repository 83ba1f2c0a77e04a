"""`python -m jobs.demo`."""

from jobs.command_line import run_command
from jobs.demo.command import demo_command

run_command(demo_command)
