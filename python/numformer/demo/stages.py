"""The stages of the demo in their order, each with one line of plain result."""
import time
from collections.abc import Callable
from dataclasses import dataclass

import numformer as nf
from numformer.demo import align, data, pretrain, report, shrink, talk
from numformer.demo.errors import DemoError

__all__ = ["STAGES", "Stage", "go"]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes
    ----------
    name : str
        In the metrics.
    title : str
        On the screen.
    work : callable
        ``work(run) -> (result, speeds)``, dicts of what can be compared bit for bit and what cannot.
    say : callable
        ``say(result, speeds) -> str``, the line of plain result.
    """

    name: str
    title: str
    work: Callable
    say: Callable


STAGES = [
    Stage("data", "1 data", data.work, data.say),
    Stage("pretrain-experts", "2 pretrain, experts", pretrain.work_experts, pretrain.say),
    Stage("pretrain-dense", "2 pretrain, dense", pretrain.work_dense, pretrain.say),
    Stage("sft", "3 fine-tune", align.work_sft, align.say_sft),
    Stage("reward", "3 reward model", align.work_reward, align.say_reward),
    Stage("ppo", "3 PPO", align.work_ppo, align.say_ppo),
    Stage("prune", "4 prune", shrink.work_prune, shrink.say_prune),
    Stage("quantize", "5 quantize", shrink.work_quantize, shrink.say_quantize),
    Stage("generate", "6 generate", talk.work, talk.say),
]


def go(run):
    """Do what is left to do of a run, then write the report."""
    print(f"numformer.demo --minutes {run.plan.minutes} --seed {run.seed}, {nf.get_num_threads()} threads, out: "
          f"{run.folder}", flush=True)
    begin = time.perf_counter()
    for stage in STAGES:
        if stage.name not in run.results:
            run.begin_stage(stage.name)
            try:
                result, speeds = stage.work(run)
            except DemoError as error:
                if error.code == 2 and not run.results:         # the text is at fault: nothing was begun
                    run.discard()
                raise
            run.end_stage(result, speeds)
        said = stage.say(run.results[stage.name], run.speeds[stage.name])
        print(f"{stage.title:<20} {talk.shown(said)}", flush=True)
    path = report.write(run)
    run.finish()
    print(f"{'report':<20} {path} ({time.perf_counter() - begin:.0f} s in all)", flush=True)
