"""One model on several processes: heads, experts and columns by rank, and the ranks of a job."""

from kimi_linear.parallel.context import kda_over_ranks, layer_over_ranks
from kimi_linear.parallel.job import Job, JobError, RankLost, joined
from kimi_linear.parallel.plan import load

__all__ = ["Job", "JobError", "RankLost", "joined", "kda_over_ranks", "layer_over_ranks", "load"]
