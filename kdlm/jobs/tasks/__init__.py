"""What the tasks of `eval/tasks` call: documents from the sandbox, and the judging of what a model answers."""
