"""A taskset of the verifiers library, for tests: sums, with a tool server for each task and a shared one."""

import verifiers.v1 as vf


class SumState(vf.State):
    added: tuple[int, ...] = ()


class AdderConfig(vf.ToolsetConfig):
    pass


class Adder(vf.Toolset[AdderConfig, SumState]):
    @vf.tool
    def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        self.state.added = (*self.state.added, a + b)
        return a + b

    @vf.tool
    def sums(self) -> str:
        """All sums so far."""
        return str(list(self.state.added))


class SumData(vf.TaskData):
    answer: int


class SumTask(vf.Task[SumData, SumState]):
    @classmethod
    def toolsets(cls, config):
        return [Adder(AdderConfig())]

    async def setup(self, trace: vf.Trace) -> None:
        if self.data.answer == 7:
            raise RuntimeError("no chalk")

    @vf.reward(weight=0.75)
    async def right(self, trace: vf.Trace) -> float:
        if "crash" in trace.last_reply:
            raise RuntimeError("no paper")
        return float(trace.last_reply == str(self.data.answer))

    @vf.reward(weight=0.25)
    async def used(self, trace: vf.Trace) -> float:
        calls = [call for message in trace.assistant_messages for call in message.tool_calls or []]
        return float(bool(trace.state.added) and len(calls) == len(trace.tool_messages) > 0 and trace.num_turns > 1)


class SumConfig(vf.TasksetConfig):
    system: str = "Be brief."
    stops: bool = False


class StoppedTask(SumTask):
    @vf.stop
    async def enough(self, trace: vf.Trace) -> bool:
        return True


class SumTaskset(vf.Taskset[SumTask, SumConfig]):
    def load(self):
        kind = StoppedTask if self.config.stops else SumTask
        for k in range(6):
            prompt = f"What is {k} + {k + 1}?"
            yield kind(SumData(prompt=prompt, system_prompt=self.config.system, answer=2 * k + 1), self.config.task)


__all__ = ["SumTaskset"]

if __name__ == "__main__":
    Adder.run()
