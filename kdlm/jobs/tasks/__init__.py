"""What the tasks of `eval/tasks` call: documents from the sandbox, and the judging of what a model answers.

Every document gives every metric a number, which is averaged over documents, or a tuple of numbers, of which the metric
is made after they are summed over documents. So a jackknife over documents gives its standard error.
"""
