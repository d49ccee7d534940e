"""What the tasks of `eval/tasks` call: documents from the sandbox, and the judging of what a model answers.

What this room judges gives each metric a number of every document, to be averaged, or a tuple of numbers, of which the
metric is made after they are summed over documents. So a jackknife over documents gives its standard error.
"""
