"""report.html: one page that carries its own figures and needs no script."""
import html

from numformer.demo import figures
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
    a, b = run.results["pretrain-experts"], run.results.get("pretrain-dense")
    if b is None:
        return ""
    plan = run.plan
    text = (f"<p>Two models of {plan.n_layer} layers, {plan.n_embd} features and {plan.n_head} heads see the same "
            f"{a['tokens']:,} tokens in the same order. In one, each feed-forward layer is {plan.n_expert} experts, "
            f"of which a token passes through two; in its dense twin a token meets as many parameters "
            f"({b['active_parameters'] / 1e6:.2f} M against {a['active_parameters'] / 1e6:.2f} M). "
            f"AdamW, {plan.warmup} steps of warm-up, then a cosine.</p>")
    learning = _figure(figures.as_image(figures.learning(run), "Learning curves"),
                       f"Bits a byte on {plan.probe_windows} windows of held-out text. By the step experts cost "
                       "nothing; "
                       "by the clock they pay for their larger step.")
    load = _figure(figures.as_image(figures.expert_load(run), "Expert load"),
                   "No token is dropped; a load-balancing loss keeps the experts in use.")
    return _title(2, "Pretraining") + text + learning + load


_SECTIONS = [("data", _data), ("pretrain-experts", _pretrain)]


def _text(value):
    return html.escape(str(value))


def _title(number, text):
    return f"<h2><i>{number}</i>{text}</h2>"


def _cards(cards):
    return '<div class="numbers">' + "".join(f'<div class="number"><b>{_text(a)}</b><span>{_text(b)}</span></div>'
                                             for a, b in cards) + "</div>"


def _figure(image, caption):
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _table(heads, rows):
    head = "".join(f"<th>{_text(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
