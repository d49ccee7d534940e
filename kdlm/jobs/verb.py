"""`kdlm eval`: run a job, write what it found, and show it."""

from kdlm.jobs.harness import require
from kdlm.jobs.job import Job
from kdlm.jobs.results import results, write
from kdlm.jobs.running import distillation, evaluate, speed


def run(job: Job) -> None:
    """Evaluate the job's models, write results.json, results.md and samples/ into its output folder, print the table.

    Raises ValueError that names the key, for what cannot be done.
    """
    require()
    given = evaluate(job, lambda line: print(line, flush=True))
    found = results(job, given)
    if job.distillation is not None:
        found["distillation"] = distillation(job, given)
    if job.speed is not None:
        found["speed"] = speed(job)
    write(job, found, given)
    print(f"\n{(job.output / 'results.md').read_text(encoding='utf-8')}\nresults: {job.output / 'results.json'}")
