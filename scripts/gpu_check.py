"""The steps of gpu-check.sh, which unpacks the bundle and starts this.

usage: gpu_check.py --started SECONDS --out FOLDER BUNDLE
"""

import argparse
import glob
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import gpu_gguf

# Everything ends by then, so that the whole stays under nine minutes.
TOTAL_SECONDS = 520
DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda:0")
REHEARSAL = DEVICE == "cpu"
GB = 1e9


class Failed(Exception):
    """A check that found something wrong."""


class Skipped(Exception):
    """A check that this machine cannot make."""


class Run:
    """Results so far, time left, and how to start programs."""

    def __init__(self, bundle, out, started):
        self.bundle, self.out, self.started = bundle, out, started
        self.checks, self.info, self.floors, self.speeds = [], {}, {}, []
        self.logs = bundle / "logs"
        self.logs.mkdir(exist_ok=True)
        self.env = dict(os.environ, QWEN_SERVER_LOG_FORMAT="text")
        self.env["LD_LIBRARY_PATH"] = ":".join(library_folders() + [os.environ.get("LD_LIBRARY_PATH", "")])

    def left(self):
        return TOTAL_SECONDS - (time.time() - self.started)

    def step(self, name, limit, action):
        """Runs one step within its limit and what is left, and writes down how it went."""
        begun = time.time()
        # A machine without a card is slow, and what it finds is only that the script works.
        seconds = min(4 * limit if REHEARSAL else limit, self.left())
        print(f"== {name} (at most {seconds:.0f} s)", flush=True)
        try:
            if seconds < 5:
                raise Skipped("no time was left")
            detail, state = action(time.time() + seconds), "passed"
        except Skipped as why:
            detail, state = str(why), "skipped"
        except subprocess.TimeoutExpired:
            detail, state = f"not done after {seconds:.0f} s", "failed"
        except Exception as why:  # A broken step must not cost the others.
            detail, state = f"{type(why).__name__}: {why}", "failed"
        took = time.time() - begun
        print(f"   {state} in {took:.1f} s: {detail}", flush=True)
        self.checks.append({"name": name, "state": state, "seconds": round(took, 1), "detail": str(detail)})
        self.write()

    def program(self, name, arguments, until, **env):
        """Runs a program to its end; returns its output and exit code. Nothing of it outlives `until`."""
        with open(self.logs / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                arguments, stdout=log, stderr=subprocess.STDOUT, env={**self.env, **env},
                cwd=self.bundle, start_new_session=True,
            )
            try:
                code = process.wait(timeout=max(1.0, until - time.time()))
            finally:
                end(process)
        return (self.logs / f"{name}.log").read_text(errors="replace"), code

    def write(self):
        results = {
            "info": self.info, "checks": self.checks, "floors": self.floors, "speeds": self.speeds,
            "seconds": round(time.time() - self.started, 1),
        }
        (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (self.out / "results.md").write_text(markdown(results))
        # One file, because some machines give few files back.
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            archive.add(self.logs, arcname="logs")


def end(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def library_folders():
    """Where CUDA's libraries are if they came as Python packages."""
    sites = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found = [folder for site in sites for folder in glob.glob(f"{site}/nvidia/*/lib")]
    # The toolkit that the kernels were built with comes first.
    found.sort(key=lambda folder: "/cu13/" not in folder)
    return found + [folder for folder in ("/usr/local/nvidia/lib64", "/usr/local/cuda/lib64") if os.path.isdir(folder)]


def require(condition, what):
    if not condition:
        raise Failed(what)


# What the machine is.


def describe_machine(run):
    def action(until):
        run.info["commit"] = (run.bundle / "commit").read_text().strip()
        run.info["libraries"] = library_folders()
        query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        try:
            output, code = run.program(
                "nvidia-smi", ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], until)
        except FileNotFoundError:
            raise Skipped("there is no nvidia-smi")
        require(code == 0, output.strip()[-300:])
        run.info["gpu"] = output.strip()
        return output.strip()

    return action


# Kernels and models, by the tests of the build.


def link_manifest(run):
    """Tests look for models where the sources were when they were built."""
    manifest = pathlib.Path((run.bundle / "manifest-dir").read_text().strip())
    if not (manifest / "models/tiny").is_dir():
        manifest.parent.mkdir(parents=True, exist_ok=True)
        if manifest.is_symlink():
            manifest.unlink()
        manifest.symlink_to(run.bundle)


# Parts of the names of all tests that use a card.
KERNEL_TESTS = [
    "gpu",
    "ops::add_scaled",
    "ops::gather_columns",
    "ops::gather_rows",
    "ops::low_rank",
    "ops::silu_mul",
    "ops::sample",
    "sampling::device_sampler",
]
MODEL_TESTS = ["gpu", "dummy", "sorted_differently"]


def tests(run, name, program, arguments):
    def action(until):
        link_manifest(run)
        output, code = run.program(name, [f"bin/{program}", "--test-threads=4", *arguments], until)
        found = re.search(r"test result: (\w+)\. (\d+) passed; (\d+) failed", output)
        failures = re.findall(r"^test (\S+) \.\.\. FAILED", output, re.M)
        require(found, f"the tests ended with code {code}: {output[-300:]}")
        require(code == 0, f"{found[3]} failed: {', '.join(failures)}")
        require(int(found[2]) > 0, "no test was run")
        return f"{found[2]} tests"

    return action


def sanitizer(run, tool):
    def action(until):
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if REHEARSAL or not os.path.exists(program):
            raise Skipped("there is no compute-sanitizer")
        # A model of every quantisation that prefills, decodes, and replays a recording.
        output, code = run.program(
            f"sanitizer-{tool}",
            [program, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20",
             "bin/qwen-server", "bench", "--direct", "models/tiny/k-quants.gguf", "--concurrency", "3",
             "--requests", "3", "--prompt-tokens", "70", "--output-tokens", "6"],
            until, QWEN_SERVER_DEVICE=DEVICE, QWEN_SERVER_KV_CACHE_MEMORY="64MiB")
        summary = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", output)
        if "Device not supported" in output:
            raise Skipped("compute-sanitizer does not support this machine")
        require(code == 0 and summary, f"code {code}: {' '.join(summary) or output[-300:]}")
        return summary[-1]

    return action


# A server, and what it says.


class Server:
    def __init__(self, run, name, model, until, device=DEVICE, **settings):
        self.run, self.until = run, until
        self.log = run.logs / f"server-{name}.log"
        env = {**run.env, "QWEN_SERVER_DEVICE": device}
        env |= {f"QWEN_SERVER_{key.upper()}": value for key, value in settings.items()}
        self.begun = time.time()
        self.process = subprocess.Popen(
            ["bin/qwen-server", "serve", "--model", str(model), "--port", "0"], env=env,
            cwd=run.bundle, stdout=open(self.log, "w"), stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self):
        try:
            self.wait_until_ready()
        except BaseException:
            end(self.process)
            raise
        return self

    def wait_until_ready(self):
        while True:
            log = self.log.read_text(errors="replace")
            ready = re.search(r"ready on (http://\S+)", log)
            if ready:
                self.url = re.sub(r"\x1b\[[0-9;]*m", "", ready[1])
                self.seconds_to_ready = time.time() - self.begun
                return
            require(self.process.poll() is None, f"the server ended: {log[-500:]}")
            require(time.time() < self.until, f"the server was not ready in time: {log[-300:]}")
            time.sleep(0.1)

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            pass
        end(self.process)

    def get(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        timeout = max(1.0, self.until - time.time())
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.read().decode()

    def complete(self, prompt, max_tokens, **fields):
        """Token ids and log-probabilities of a greedy answer, and those of the prompt if asked for."""
        model = json.loads(self.get("/v1/models"))["data"][0]["id"]
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
                "repetition_penalty": 1.0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True,
                **fields}
        choice = json.loads(self.get("/v1/completions", body))["choices"][0]
        prompt_logprobs = [
            position[str(token)]["logprob"]
            for token, position in zip(prompt, choice.get("prompt_logprobs") or []) if position
        ]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"], prompt_logprobs

    def bench(self, name, **options):
        path = self.run.logs / f"bench-{name}.json"
        arguments = ["bin/qwen-server", "bench", "--url", self.url, "--json", str(path)]
        for key, value in options.items():
            arguments += [f"--{key.replace('_', '-')}", str(value)]
        output, code = self.run.program(f"bench-{name}", arguments, self.until)
        require(code == 0, output[-300:])
        report = json.loads(path.read_text())
        failed = [level for level in report["levels"] if level["num_failed"]]
        require(not failed, f"{failed and failed[0]['first_failure']}")
        return report["levels"]

    def step_seconds(self):
        """How long all steps took, and how many there were."""
        lines = self.get("/metrics").splitlines()
        number = lambda word: sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"qwen_step_seconds_{word}"))
        return number("sum"), number("count")


def difference(ours, theirs):
    errors = [abs(a - b) for a, b in zip(ours, theirs)]
    return max(errors), sum(errors) / len(errors)


PROMPTS = [[(i * 31 + 7 * n) % 200 for i in range(length)] for n, length in enumerate((3, 33, 130))]


def same_everywhere(run, quantization):
    """Recorded = launched, and the card = the processor, on a model of the shape of the smallest one."""
    model = "models/tiny/mixed.gguf" if REHEARSAL else f"qwen2.5-0.5b-instruct:{quantization}"
    common = {"load_format": "dummy", "kv_cache_memory": "256MiB", "max_model_len": "512"}

    def answers(name, until, **settings):
        with Server(run, name, model, until, DEVICE, **common, **settings) as server:
            return [server.complete(prompt, 24) for prompt in PROMPTS]

    def action(until):
        recorded = answers(f"recorded-{quantization}", until)
        launched = answers(f"launched-{quantization}", until, enforce_eager="true")
        require(recorded == launched, "recorded steps give other answers than launched ones")
        # The processor says how likely it finds what the card wrote.
        worst, means = 0.0, []
        with Server(run, f"cpu-{quantization}", model, until, "cpu", **common) as server:
            for prompt, (tokens, logprobs, _) in zip(PROMPTS, recorded):
                _, _, theirs = server.complete(prompt + tokens, 1, prompt_logprobs=0)
                largest, mean = difference(logprobs, theirs[-len(tokens):])
                worst, means = max(worst, largest), means + [mean]
        mean = sum(means) / len(means)
        require(worst < 0.4 and mean < 0.06, f"log-probabilities differ by {worst:.3f}, {mean:.3f} on average")
        return f"recorded = launched; log-probabilities differ from the CPU's by {worst:.3f}, {mean:.3f} on average"

    return action


# By type of the weights: largest and average error of a log-probability, and how much better than the second
# a token must be to be clear. F16 weights are rounded to BF16 on the card.
TOLERANCES = {"bf16": (0.4, 0.04, 0.3), "f16": (1.0, 0.06, 0.4)}


def hugging_face(run, dtype):
    def action(until):
        most, most_on_average, clear = TOLERANCES[dtype]
        try:
            import torch  # noqa: F401
            import transformers
        except ImportError as why:
            raise Skipped(f"{why}")
        path = run.bundle / f"hf-{dtype}.gguf"
        references = gpu_gguf.random_qwen2(path, dtype)
        errors, num_clear = [], 0
        with Server(run, f"hf-{dtype}", path, until, kv_cache_memory="256MiB") as server:
            for golden in references:
                prompt, greedy = golden["prompt"], golden["greedy"]
                forced = prompt + greedy[:-1]
                _, _, ours = server.complete(forced, 1, prompt_logprobs=0)
                require(len(ours) == len(golden["logprobs"]), "the server scored another number of tokens")
                errors += [abs(a - b) for a, b in zip(ours, golden["logprobs"])]
                tokens, _, _ = server.complete(prompt, len(greedy))
                for step, (found, expected) in enumerate(zip(tokens, greedy)):
                    if golden["margins"][step] < clear:
                        break
                    require(found == expected, f"greedy token {step} is {found}, not {expected}")
                    num_clear += 1
        worst, mean = max(errors), sum(errors) / len(errors)
        require(worst < most and mean < most_on_average, f"log-probabilities differ by {worst:.3f}, {mean:.4f} on average")
        require(num_clear >= 3, f"only {num_clear} greedy tokens were clear enough")
        return (f"transformers {transformers.__version__}: {len(errors)} log-probabilities within {worst:.3f}, "
                f"{mean:.4f} on average; {num_clear} greedy tokens")

    return action


# Speeds.


def measure_floors(run):
    def action(_until):
        try:
            import torch
        except ImportError as why:
            raise Skipped(f"{why}; shares are of 4.3 TB/s and 790 TFLOP/s")
        device = "cpu" if REHEARSAL else "cuda"
        size, width = ((32 << 20, 512) if REHEARSAL else (4 << 30, 8192))
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        run.floors["copy_bytes_per_second"] = 2 * size / fastest(lambda: target.copy_(source), torch)
        del source, target
        a = torch.randn(width, width, dtype=torch.bfloat16, device=device)
        b = torch.randn(width, width, dtype=torch.bfloat16, device=device)
        run.floors["bf16_flops"] = 2 * width**3 / fastest(lambda: a @ b, torch)
        del a, b
        if not REHEARSAL:
            torch.cuda.empty_cache()
        run.floors["measured"] = not REHEARSAL
        return (f"copy {run.floors['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
                f"bf16 product {run.floors['bf16_flops'] / 1e12:.0f} TFLOP/s")

    return action


def fastest(action, torch):
    """Median seconds of seven, after three to warm up."""
    if REHEARSAL:
        begun = time.time()
        action()
        return time.time() - begun
    for _ in range(3):
        action()
    times = []
    for _ in range(7):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]


# Bytes that a step reads once: all matrices but the embedding. Weights that a token multiplies with, without
# the head. Key and value bytes of a token. Attention's operations are 4 x layers x width per pair of tokens.
MODELS = {
    "qwen2.5-7b-instruct:bf16": dict(bytes=14.142e9, weights=6.526e9, kv=57_344, layers=28, width=3584),
    "qwen2.5-7b-instruct:q4_k_m": dict(bytes=4.371e9, weights=6.526e9, kv=57_344, layers=28, width=3584),
    "qwen2.5-72b-instruct:q4_k_m": dict(bytes=43.304e9, weights=70.46e9, kv=327_680, layers=80, width=8192),
    "qwen2.5-0.5b-instruct:q4_0": dict(bytes=0.347e9, weights=0.358e9, kv=12_288, layers=24, width=896),
}
HEAD_ROWS = 152_064


def floor_seconds(run, model, num_seqs, context):
    """The least time of a decode step."""
    facts = MODELS[model]
    bandwidth = run.floors.get("copy_bytes_per_second", 4.3e12)
    peak = run.floors.get("bf16_flops", 790e12)
    moved = facts["bytes"] + num_seqs * context * facts["kv"]
    weights = facts["weights"] + HEAD_ROWS * facts["width"]
    return max(moved / bandwidth, 2 * weights * num_seqs / peak)


def decode(run, server, model, num_seqs, target):
    # Long enough that the prompts weigh little, short enough for nine minutes.
    prompt, output = (16, 8) if REHEARSAL else (128, 256)
    requests = 3 if num_seqs == 1 else num_seqs
    if not REHEARSAL and num_seqs > 1:
        # Records the shapes, so that the figures are of a server that has run for a while.
        server.bench("warm-up", concurrency=num_seqs, requests=num_seqs, prompt_tokens=prompt, output_tokens=24)
    name = re.sub(r"\W+", "-", model) + f"-{num_seqs}"
    (level,) = server.bench(
        name, concurrency=num_seqs, requests=requests, prompt_tokens=prompt, output_tokens=output)
    floor = num_seqs / floor_seconds(run, model, num_seqs, prompt + output / 2)
    if num_seqs == 1:
        value, kind = 1e3 / level["inter_token_ms"]["p50"], "decode, one stream"
    else:
        value, kind = level["output_tokens_per_second"], f"{num_seqs} streams, total"
    run.speeds.append({
        "row": f"{model} {kind}", "value": value, "unit": "tok/s", "target": target, "floor": floor,
        "share": value / floor, "reached": value >= target, "ttft_ms": level["ttft_ms"],
        "inter_token_ms": level["inter_token_ms"], "seconds_to_ready": server.seconds_to_ready,
    })
    return f"{value:.0f} tok/s"


def prefill(run, server, model, target_share):
    length = 64 if REHEARSAL else 4096
    name = re.sub(r"\W+", "-", model) + "-prefill"
    (level,) = server.bench(name, concurrency=1, requests=5, prompt_tokens=length, output_tokens=2)
    facts = MODELS[model]
    operations = 2 * facts["weights"] * length + 4 * facts["layers"] * facts["width"] * length**2 / 2
    floor = operations / run.floors.get("bf16_flops", 790e12)
    seconds = level["ttft_ms"]["p50"] / 1e3
    run.speeds.append({
        "row": f"{model} prefill of {length} tokens", "value": length / seconds, "unit": "tok/s",
        "target": target_share * length / floor, "floor": length / floor, "share": floor / seconds,
        "reached": floor / seconds >= target_share, "ttft_ms": level["ttft_ms"],
        "seconds_to_ready": server.seconds_to_ready,
    })
    return f"{1e3 * seconds:.0f} ms, {100 * floor / seconds:.0f} % of the peak"


def speeds(run, model, rows):
    """`rows` are numbers of streams with their targets, or "prefill"."""

    def action(until):
        if REHEARSAL:
            measured = "qwen2.5-0.5b-instruct:q4_0"
        else:
            measured = model
        done = []
        with Server(run, re.sub(r"\W+", "-", model), measured, until, load_format="dummy",
                    max_model_len="8192") as server:
            for streams, target in rows:
                if streams == "prefill":
                    done.append(prefill(run, server, measured, target))
                else:
                    done.append(decode(run, server, measured, min(streams, 2) if REHEARSAL else streams, target))
                run.write()
            return f"ready after {server.seconds_to_ready:.1f} s; " + ", ".join(done)

    return action


def host_time(run):
    """A model of one layer keeps the card busy for tens of microseconds: its steps are the host's time."""

    def action(until):
        path = run.bundle / "one-layer.gguf"
        gpu_gguf.write_one_layer(path)
        with Server(run, "one-layer", path, until, load_format="dummy", kv_cache_memory="64MiB") as server:
            server.bench("one-layer-warm-up", concurrency=1, requests=1, prompt_tokens=16, output_tokens=64)
            before = server.step_seconds()
            server.bench("one-layer", concurrency=1, requests=3, prompt_tokens=16, output_tokens=256)
            after = server.step_seconds()
        steps = after[1] - before[1]
        require(steps > 0, "the server counted no steps")
        microseconds = 1e6 * (after[0] - before[0]) / steps
        run.speeds.append({
            "row": "host time per decode step, at most (a whole step of one layer)", "value": microseconds,
            "unit": "µs", "target": 150, "floor": 0, "share": None, "reached": microseconds < 150,
        })
        return f"at most {microseconds:.0f} µs"

    return action


def markdown(results):
    lines = ["# gpu-check", ""]
    lines += [f"- {key}: {value}" for key, value in results["info"].items() if key != "libraries"]
    floors = results["floors"]
    if floors:
        lines.append(f"- measured here: copy {floors['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
                     f"bf16 product {floors.get('bf16_flops', 0) / 1e12:.0f} TFLOP/s")
    lines += [f"- {results['seconds']} s altogether", "", "| check | | s | |", "|---|---|---|---|"]
    for check in results["checks"]:
        detail = check["detail"].replace("|", "\\|").replace("\n", " ")[:400]
        lines.append(f"| {check['name']} | {check['state']} | {check['seconds']} | {detail} |")
    lines += ["", "| row | measured | target | limit of the card | share | |", "|---|---|---|---|---|---|"]
    for speed in results["speeds"]:
        share = "" if speed["share"] is None else f"{100 * speed['share']:.0f} %"
        limit = f"{speed['floor']:.0f}" if speed["floor"] else ""
        state = "reached" if speed["reached"] else "not reached"
        lines.append(f"| {speed['row']} | {speed['value']:.0f} {speed['unit']} | {speed['target']:.0f} | "
                     f"{limit} | {share} | {state} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--started", type=float, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("bundle", type=pathlib.Path)
    arguments = parser.parse_args()
    # So that servers end with the script when its time is over.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    run = Run(arguments.bundle.resolve(), arguments.out.resolve(), arguments.started)
    b7, q7, q72 = list(MODELS)[:3]
    run.step("machine", 15, describe_machine(run))
    run.step("floors", 60, measure_floors(run))
    run.step("kernels = CPU", 100, tests(run, "kernels", "lib-tests", KERNEL_TESTS))
    run.step("models = Hugging Face, recorded = launched", 70, tests(run, "models", "models-tests", MODEL_TESTS))
    run.step("0.5B-shaped q4_k_m: card = CPU", 45, same_everywhere(run, "q4_k_m"))
    run.step("0.5B-shaped bf16: card = CPU", 45, same_everywhere(run, "bf16"))
    run.step("Hugging Face here, bf16", 45, hugging_face(run, "bf16"))
    run.step("Hugging Face here, f16", 30, hugging_face(run, "f16"))
    run.step("speeds of 7B bf16", 60, speeds(run, b7, [(1, 240), (64, 9000), ("prefill", 0.45)]))
    run.step("speeds of 7B Q4_K_M", 40, speeds(run, q7, [(1, 480)]))
    run.step("speeds of 72B Q4_K_M", 90, speeds(run, q72, [(1, 75), (32, 1200)]))
    run.step("host time", 25, host_time(run))
    run.step("compute-sanitizer memcheck", 60, sanitizer(run, "memcheck"))
    run.step("compute-sanitizer racecheck", 60, sanitizer(run, "racecheck"))
    print((run.out / "results.md").read_text())
    sys.exit(any(check["state"] == "failed" for check in run.checks))


if __name__ == "__main__":
    main()
