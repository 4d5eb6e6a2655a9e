"""`experiments.prove_ultraclean`: no document on two sides, bad flags."""

import json

from experiments import _prove_ultraclean, prove_ultraclean


def test_no_article_is_on_two_sides(shared_dir, tmp_path):
  files = _prove_ultraclean.split(shared_dir / "data" / "mini", tmp_path)
  assert {key.split("/")[0] for key in files} == {"held_out", "seeds", "raw"}
  articles: dict[str, set] = {}
  for key, path in files.items():
    role, name = key.split("/")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    articles[key] = {(name, r.get("title") or r.get("path") or r["id"]) for r in rows}
  keys = list(files)
  for i, key in enumerate(keys):
    for other in keys[:i]:
      assert not articles[key] & articles[other], (key, other)
  hidden = len(articles["raw/zh_wiki_cmrc"]) / len(articles["seeds/zh_wiki_cmrc"])
  assert 0.5 < hidden < 2


def test_bad_flags(capsys):
  assert prove_ultraclean.main(["prove_ultraclean", "--shared=x"]) == 1
  assert "--workdir: found none" in capsys.readouterr().err
