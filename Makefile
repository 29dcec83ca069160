# make demo    environment, both stages on the embedded digits, samples, a table of distances: 8 minutes on two AVX2 cores
# make test    the tests
# make exercises    matplotlib for the pictures of the course, and its first exercise
# make demo SEED=1 repeats it with another seed, in runs/digits-1.

PYTHON ?= python3
SEED ?= 0
OUT ?= runs/digits$(if $(filter-out 0,$(SEED)),-$(SEED))
PY = .venv/bin/python
RUNS = $(patsubst %, tests/test_%.py, runs training method fid fuzz exercises_teacher exercises_closed_form)

.PHONY: demo test test-runs test-others exercises

demo: .venv/ready
	$(PY) pretrain.py --seed $(SEED) --outdir $(OUT)/pretrain
	$(PY) train_diffratio.py --seed $(SEED) --init $(OUT)/pretrain/network.pt --outdir $(OUT)/dijs
	$(PY) exercises/demo.py --pretrained $(OUT)/pretrain/network.pt --generator $(OUT)/dijs/network.pt --outdir $(OUT) --seed $(SEED)

test: .venv/ready  # in two processes of one thread each, which is faster than one process of two
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(MAKE) --no-print-directory -j2 test-runs test-others

test-runs:
	$(PY) -m pytest -q $(RUNS)

test-others:
	$(PY) -m pytest -q $(filter-out $(RUNS), $(wildcard tests/test_*.py))

exercises: .venv/ready-exercises
	$(PY) exercises/warmups.py

.venv/ready-exercises: .venv/ready
	$(PY) -m pip install --quiet --disable-pip-version-check matplotlib==3.10.9
	@touch $@

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
