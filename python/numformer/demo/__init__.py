"""The tour, ``python -m numformer.demo``: a small GPT with experts, from raw text to a page that tells how it went.

    plan.py       how many steps of everything for --minutes N: a table, never the clock
    corpus.py     files, the held-out split, the tokenizer, what gzip and xz make of the same files
    examples.py   prompts with completions cut from the corpus
    scorer.py     the program that judges a completion
    run.py        the out folder: what is done, how to go on after a kill
    stages.py     the stages in their order; data.py, pretrain.py, align.py, shrink.py, talk.py: what they do
    report.py     report.html, from the numbers of the run; figures.py draws them
"""
