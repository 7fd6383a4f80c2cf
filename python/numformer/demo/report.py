"""report.html: one page that carries its own figures and needs no script."""
import html
import shlex

from numformer.demo import figures, talk
from numformer.demo.data import Corpus
from numformer.demo.pretrain import load
from numformer.demo.shrink import pruned_heads
from numformer.demo.style import CSS
from numformer.files import replace_file

__all__ = ["page", "write"]


def write(run):
    """Write report.html of a run; return its path."""
    path = run.folder / "report.html"
    replace_file(path, page(run))
    return path


def page(run):
    """The page as a string."""
    parts = [_head(run)]
    parts += [section(run) for stage, section in _SECTIONS if stage in run.results]
    parts.append(_foot(run))
    return ("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
            f"<title>A small GPT, from text to talk · numformer</title><style>{CSS}</style></head>\n<body><main>\n"
            + "\n".join(parts) + "\n</main></body></html>\n")


def _head(run):
    data = run.results["data"]
    cards = [(f"{data['train_bytes'] / 1e6:.1f} MB", f"{data['train_files']} files to learn from, "
              f"{data['held_out_files']} others kept apart")]
    model = run.results.get("pretrain-experts")
    if model:
        cards.append((f"{model['parameters'] / 1e6:.1f} M", f"parameters, {model['active_parameters'] / 1e6:.1f} M of "
                      "them met by each token"))
        cards.append((f"{model['bits_per_byte']:.2f}", "bits a byte on the held-out files; gzip -9 "
                      f"{data['gzip']:.2f}, xz -9 {data['xz']:.2f}"))
    seconds = sum(speeds["seconds"] for speeds in run.speeds.values())
    cards.append((f"{int(seconds) // 60}:{int(seconds) % 60:02d}", "minutes in all"))
    return (f'<div class="kicker">numformer · the tour</div><h1>A small GPT with experts, from text to talk</h1>'
            f'<p class="lead">Pretrained on {_text(data["source"])}, fine-tuned, aligned, pruned and quantized, with '
            f'nothing but NumPy arrays and the kernels of numformer.</p>' + _cards(cards))


def _data(run):
    d = run.results["data"]
    rows = [["gzip -9", f"{d['gzip_by_file']:.3f}", f"{d['gzip']:.3f}"],
            ["xz -9", f"{d['xz_by_file']:.3f}", f"{d['xz']:.3f}"]]
    return (_title(1, "Data") +
            f"<p>{_text(d['source'][0].upper() + d['source'][1:])}: {d['files']} files. Which of them are held "
            f"out is decided by a hash of their path, file by file, so no line of a held-out file was ever learned "
            f"from. A byte-level BPE of {d['vocabulary']} tokens, trained on the rest, makes {d['train_tokens']:,} "
            f"tokens of it; on the held-out "
            f"files a token stands for {d['bytes_per_token']:.2f} bytes.</p>"
            + _table(["bits a byte on the held-out files", "each file by itself", "all in one"], rows))


def _pretrain(run):
    a, b = run.results["pretrain-experts"], run.results["pretrain-dense"]
    plan = run.plan
    text = (f"<p>Two models of {plan.n_layer} layers, {plan.n_embd} features and {plan.n_head} heads see the same "
            f"{a['tokens']:,} tokens in the same order. In one, each feed-forward layer is {plan.n_expert} experts, "
            f"of which a token passes through two; in its dense twin a token meets as many parameters "
            f"({b['active_parameters'] / 1e6:.2f} M against {a['active_parameters'] / 1e6:.2f} M). "
            f"AdamW, {plan.warmup} steps of warm-up, then a cosine.</p>")
    learning = _figure(figures.as_image(figures.learning(run), "Learning curves"),
                       f"Bits a byte on {plan.probe_windows} windows of held-out text: what a step is worth, and "
                       "what a second is worth.")
    load = _figure(figures.as_image(figures.expert_load(run), "Expert load"),
                   "No token is dropped; a load-balancing loss keeps the experts in use.")
    return _title(2, "Pretraining") + text + learning + load


def _align(run):
    sft, reward, ppo = (run.results[stage] for stage in ("sft", "reward", "ppo"))
    first, best = run.log["ppo"][0], ppo["best_of_n"][-1]
    text = (f"<p>The model with experts learns to complete {sft['kind']}: {sft['examples']:,} of them, cut from the "
            f"training files, loss on the completions alone. <b>No person judged anything here.</b> A program scores a "
            f"completion from 0 to 1: {_RULES[sft['kind']]}. It gives the corpus itself {sft['score_of_corpus']:.2f}, "
            f"the same completions moved to other prompts {sft['score_of_shuffled']:.2f}, and samples of the "
            f"fine-tuned model {sft['score']:.2f}.</p>"
            f"<p>From {reward['pairs']} pairs that this program ranked, a reward model (it begins as the fine-tuned "
            f"model) learned to put {100 * reward['accuracy']:.0f} % of {reward['test_pairs']} pairs of held-out "
            f"prompts in the right order. PPO then follows the reward model alone; the program only looks on.</p>")
    tuning = _figure(figures.as_image(figures.fine_tuning(run), "Fine-tuning and reward model"),
                     "Left: gray is the training loss. Right: dots are single steps, the line their running mean.")
    numbers = _cards([
        (f"{ppo['reward_before']:+.2f} → {ppo['reward']:+.2f}", "reward on held-out prompts"),
        (f"{ppo['program_before']:.2f} → {ppo['program']:.2f}", "the program's score of the same"),
        (f"{best['reward']:+.2f}", f"reward of the best of {best['n']} samples (program {best['program']:.2f})"),
        (f"{ppo['kl']:.1f} nats", "KL to the fine-tuned model, a completion"),
        (f"{100 * ppo['ended']:.0f} %", f"of completions end by themselves, after {ppo['length']:.0f} tokens on "
                                        "average")])
    picture = _figure(figures.as_image(figures.alignment(run), "PPO"),
                      f"{ppo['iterations']} iterations. The KL of the first is exactly {first['objective/kl']:g}, and "
                      "every iteration's first ratio exactly 1, or the run would have ended with an error. Where the "
                      "reward rises and the program's score does not, the reward model is being outwitted.")
    rows = [[line["step"] + 1, f"{line['objective/scores']:+.2f}", f"{line['program']:.2f}",
             f"{line['objective/kl']:.2f}", f"{line['kl_coef']:.4f}", f"{line['length']:.0f}",
             f"{line['policy/entropy_avg']:.2f}", f"{100 * line['policy/clipfrac_avg']:.1f} %",
             f"{line['explained_variance']:.2f}"] for line in run.log["ppo"]]
    table = _folded("Every iteration", _table(
        ["iteration", "reward", "program", "KL", "coefficient", "tokens", "entropy", "clipped", "explained variance"],
        rows))
    return _title(3, "Alignment") + text + tuning + numbers + picture + table


_RULES = {"functions": "it must end by itself and parse, and it gains by using its arguments and by not repeating "
                       "itself",
          "paragraphs": "it must end by itself, and it gains by closing its brackets and quotes and by not repeating "
                        "itself"}


def _shrink(run):
    prune = run.results["prune"]
    corpus = Corpus(run)
    prompt = "".join(talk.PROMPTS[:2]) if corpus.kind == "functions" else run.results["generate"]["prompts"][0]
    model = load(run, "ppo")
    ids = corpus.tokenizer.encode(prompt).ids[:run.plan.block_size]
    gone = pruned_heads(model, load(run, "pruned"))
    maps = figures.attention(talk.attention_maps(model, ids), prune["importance"], gone)
    random = [draw["loss"] for draw in prune["random"]]
    text = (f"<p>The gradient of the loss tells how much the model would miss each head. Without the "
            f"{prune['heads_before'] - prune['heads']} of {prune['heads_before']} that it would miss least, arrays "
            f"shrink from {prune['parameters_before']:,} to {prune['parameters']:,} parameters; the held-out loss goes "
            f"from {prune['before']['loss']:.3f} to {prune['after']['loss']:.3f} and the accuracy from "
            f"{100 * prune['before']['accuracy']:.1f} % to {100 * prune['after']['accuracy']:.1f} %. As many random "
            f"heads would cost {min(random) - prune['before']['loss']:+.3f} to "
            f"{max(random) - prune['before']['loss']:+.3f} nats.</p>")
    quantize = run.results["quantize"]
    speeds = run.speeds["quantize"]["tokens_per_second"]
    rows = [["32 bits", "–", "–", f"{prune['after']['loss']:.4f}", f"{prune['bytes'] / 1e6:.2f}",
             f"{speeds['pruned']:,.0f}"]]
    rows += [[m["label"], f"{100 * m['weight_error']:.2f} %", f"{100 * m['output_error']:.2f} %", f"{m['loss']:.4f}",
              f"{m['bytes'] / 1e6:.2f}", f"{speeds[m['name']]:,.0f}"] for m in quantize["models"]]
    table = _table(["weights", "error of the weights", "error of the outputs", "held-out loss", "MB on disk",
                    "tokens/s, decoding"], rows)
    return (_title(4, "Pruning") + text
            + _figure(figures.as_image(maps, "Attention maps"), f"What each head looks at while reading {prompt!r}: "
                      "a row for each token, the darker the more attention.")
            + _title(5, "Quantization")
            + "<p>Round-to-nearest rounds each weight by itself. GPTQ makes good for every rounding error in the "
              "weights that are still to come, so that the outputs stay close though the weights move further away.</p>"
            + table + _figure(figures.as_image(figures.shrinking(run), "Pruning and quantization"),
                              "All losses are on the same windows of held-out text."))


def _talk(run):
    result, speeds = run.results["generate"], run.speeds["generate"]["tokens_per_second"]
    names = talk.MODELS
    rows = [[names[m["name"]], f"{m['bytes'] / 1e6:.2f}", f"{m['bits_per_byte']:.3f}", f"{m['loss']:.3f}",
             f"{100 * m['accuracy']:.1f} %", f"{speeds[m['name']]:,.0f}"] for m in result["models"]]
    table = _table(["model", "MB on disk", "bits a byte", "nats a token", "accuracy", "tokens/s, decoding"], rows)
    samples = "".join(
        f'<div class="sample"><h3>{_text(names[m["name"]])}</h3>'
        + "".join(f'<pre><b>{_text(s["prompt"])}</b>{_text(s["text"].rstrip())}</pre>'
                  f'<div class="soft">score {s["score"]:.2f}</div>' for s in m["samples"])
        + "</div>" for m in result["models"])
    return (_title(6, "Every model, side by side") + table
            + "<p>The same prompts and the same seed, temperature 0.7, top-p 0.9. Held-out text is raw text: "
              "fine-tuning and PPO pull a model away from it.</p>"
            + f'<div class="samples">{samples}</div>')


def _foot(run):
    data = f" --data {shlex.quote(run.data)}" if run.data else ""
    return (f'<footer class="soft">python -m numformer.demo --minutes {run.plan.minutes} --seed {run.seed}'
            f"{_text(data)} · every number is in metrics.jsonl, every duration in timings.jsonl; the models open again "
            "with numformer.models.load.</footer>")


_SECTIONS = [("data", _data), ("pretrain-dense", _pretrain), ("ppo", _align), ("quantize", _shrink),
             ("generate", _talk)]


def _text(value):
    return html.escape(talk.shown(str(value)))


def _title(number, text):
    return f"<h2><i>{number}</i>{text}</h2>"


def _cards(cards):
    return '<div class="numbers">' + "".join(f'<div class="number"><b>{_text(a)}</b><span>{_text(b)}</span></div>'
                                             for a, b in cards) + "</div>"


def _figure(image, caption):
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _folded(summary, inner):
    return f"<details><summary>{_text(summary)}</summary>{inner}</details>"


def _table(heads, rows):
    head = "".join(f"<th>{_text(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
