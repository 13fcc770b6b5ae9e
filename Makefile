# What a stranger types.  Everything is set up in .venv in this folder; only Python 3.11+ is needed.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
KAFKA_JARS = $(or $(TRIBILL_KAFKA_JARS),$(or $(TMPDIR),/tmp)/tribill-kafka-4.1.0)
CHAOS = TRIBILL_KAFKA_JARS=$(KAFKA_JARS) $(BIN)/python -m chaos $(if $(SEED),--seed $(SEED))
# Most tests wait more than they compute, so three files at a time on two cores; a file starts its servers once.
TESTS_AT_A_TIME ?= 3
PLANTS = claim-without-position commit-before-insert commit-before-totals delta-instead-of-total no-fencing

# Where it is set every process of ours would compile all it imports again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test simulate fuzz lint lock bench bench-latency bench-growth bench-scaling bench-rating bench-publication bench-close bench-recovery pictures chaos chaos-control clean

help:
	@echo "make demo   a month of GP IT services, live and closed (ARGS=\"--exit --out DIR\" passes options on)"
	@echo "make test   set up and pass the tests, three at a time (TESTS_AT_A_TIME=n)"
	@echo "make simulate  agents interleaved in every way, from seeds (MINUTES=n, SEED=n)"
	@echo "make fuzz   atheris on whatever reads bytes from outside (TARGET=codec|intake|text|interchange|imports SECONDS=n)"
	@echo "make setup  the environment alone; the command is then .venv/bin/tribill"
	@echo "make lint   ruff and mypy"
	@echo "make lock   renew the lock files after a change of dependencies"
	@echo "make bench  the usage path against Faust, Quix Streams and Bytewax, in ten minutes at most"
	@echo "make bench-latency bench-growth bench-scaling bench-rating bench-publication bench-close bench-recovery  what else is measured (docs/performance.md)"
	@echo "make pictures  renew the pictures of documents in docs/"
	@echo "make chaos  break an installation on Apache Kafka and check every penny (SEED=n MINUTES=60 BROKERS=3 FAULTS=n)"
	@echo "make chaos-control  plant known bugs: the same check must catch each (PLANTS=name SEED=n)"

setup: .venv/installed

.venv/installed: requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tribill needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing what requirements-dev.lock names into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: setup
	@$(BIN)/tribill demo $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/mypy rating streams agents sinks tribill web chaos

test: setup lint
	@$(BIN)/python -m pytest -n $(TESTS_AT_A_TIME) --dist loadfile --no-loadscope-reorder $(ARGS)

simulate: setup
	@POLARS_MAX_THREADS=1 $(BIN)/python -m tests.simulation $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(ARGS)

fuzz: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes \
		-r tests/fuzz/requirements.lock
	@for target in $(or $(TARGET),codec intake text interchange imports); do \
		$(BIN)/python -m tests.fuzz $$target -max_total_time=$(or $(SECONDS),60) -timeout=30 $(ARGS) || exit; done

lock: setup
	@$(BIN)/python -m uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --no-header \
		--no-annotate --no-emit-index-url pyproject.toml -o requirements.lock
	@$(BIN)/python -m uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --no-header \
		--no-annotate --no-emit-index-url --extra embedded --extra dev pyproject.toml -o requirements-dev.lock
	@$(BIN)/python -m uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --no-header \
		--no-annotate --no-emit-index-url bench/peers/requirements.in -o bench/peers/requirements.lock
	@$(BIN)/python -m uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --no-header \
		--no-annotate --no-emit-index-url tests/fuzz/requirements.in -o tests/fuzz/requirements.lock

bench: setup
	@$(BIN)/python -m bench.usage $(ARGS)

bench-latency bench-growth bench-scaling bench-rating bench-publication bench-close bench-recovery: bench-%: setup
	@$(BIN)/python -m bench.$* $(ARGS)

pictures: setup
	@$(BIN)/python docs/pictures.py

$(KAFKA_JARS):
	@mvn -q -B -f tests/kafka/pom.xml dependency:copy-dependencies -DoutputDirectory=$@ || true

chaos: setup $(KAFKA_JARS)
	@$(CHAOS) $(if $(FAULTS),--faults $(FAULTS)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(BROKERS),--brokers $(BROKERS)) $(ARGS)

chaos-control: setup $(KAFKA_JARS)
	@for plant in $(PLANTS); do $(CHAOS) $(if $(SEED),,--seed 11) --plant $$plant $(ARGS) || exit; done

clean:
	rm -rf .venv .venv-bench build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
