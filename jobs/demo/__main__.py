"""`python -m jobs.demo`."""

from jobs.command_line import run_command
from jobs.demo.command import demo_command

if __name__ == "__main__":
    run_command(demo_command)
