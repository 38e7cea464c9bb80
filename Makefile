# .venv holds the service with its tools and tests, and runs the demo; LiteLLM and MLflow pin other versions of the
# same packages and have environments of their own. A stamp in each says what was installed from which lock.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check faults attack money score replicas bench clients lock clean env dashboards stack-test stack-programs demo-stack compose-test chart-schema helm-test chart-test

COVERAGE_FLOOR := 97
UV_VERSION := 0.13.9
ARGS :=

VENV := .venv/.project
LITELLM := .venv-litellm/.packages
MLFLOW := .venv-mlflow/.packages
CLIENTS := .venv-clients/.packages .venv-clients-openai2/.packages
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# A lock is whole: without --no-deps an older pip prefers a newer release of a package that is asked for with an
# extra, and then misses its hash.
PIP_INSTALL_LOCK := $(PIP_INSTALL) --no-deps --require-hashes

# A caller's warning filters or module path would break pip and change the demo.
unexport PYTHONHOME PYTHONPATH PYTHONWARNINGS

# Nothing of the caller's shell reaches the tools and the tests, except what is named here.
RUN = env -i CI="$$CI" HOME="$$HOME" LANG=C.UTF-8 PATH="$(CURDIR)/.venv/bin:$$PATH" TMPDIR="$${TMPDIR:-/tmp}"

CLIENTS_PYTHONS = LITELLM_BIN="$(CURDIR)/.venv-litellm/bin/litellm" CLIENTS_PYTHON="$(CURDIR)/.venv-clients/bin/python" \
	CLIENTS_OPENAI2_PYTHON="$(CURDIR)/.venv-clients-openai2/bin/python"
PYTEST = $(RUN) $(CLIENTS_PYTHONS) MLFLOW_BIN="$(CURDIR)/.venv-mlflow/bin/mlflow" pytest

# A test of real processes also fails where the machine stands still. One that fails is run once more, and both are
# shown; tests/conftest.py fails a run in which many needed it.
RERUN = --reruns 1 --rerun-show-tracebacks

# The JavaScript clients are tried where npm is; in CI they must be.
ifneq ($(CI)$(shell command -v npm 2>/dev/null),)
CLIENTS += tests/e2e/clients/node/node_modules/.packages
endif

# $(call new_venv,folder): the first interpreter that runs; a version manager's name for an absent one fails.
define new_venv
@for python in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
	if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		exec $$python -m venv --clear $(1); \
	fi; \
done; \
echo "No Python >= 3.11 with its venv module found. Name one: make PYTHON=/path/to/python3" >&2; \
exit 1
endef

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s%s\n", $$1, $$2}' Makefile

demo: $(VENV) $(LITELLM) $(MLFLOW) ## Start the whole thing, without Docker or an API key
	@.venv/bin/python -m deploy.demo $(ARGS)

test: $(VENV) $(LITELLM) $(MLFLOW) $(CLIENTS) ## Run the tests, with coverage and its floor; ARGS="-k name" runs some, without
ifdef ARGS
	$(PYTEST) $(ARGS)
else
	$(PYTEST) $(RERUN) -m "not alone and not stack" --numprocesses 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=
	$(PYTEST) $(RERUN) -m "alone and not stack" --cov --cov-append --cov-fail-under=$(COVERAGE_FLOOR)
endif

check: $(VENV) ## Lint, check formatting, types and import rules, then test, the stack too
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) lint-imports
	$(MAKE) test
	$(MAKE) stack-test

faults: $(VENV) ## Play the table of upstream faults against a real process; ARGS="429" plays some
	$(RUN) python -m tests.faults $(ARGS)

attack: $(VENV) ## Attack a real process for under three minutes, while a second user uses it; ARGS="--seed 5"
	$(RUN) python -m tests.faults.attack $(ARGS)

money: $(VENV) $(MLFLOW) ## Compare callers, MLflow and the ledger over 2,000 calls and five kills; ARGS=--postgresql
	$(RUN) MLFLOW_BIN="$(CURDIR)/.venv-mlflow/bin/mlflow" python -m tests.bench.money $(ARGS)

score: $(VENV) ## Compare all telemetry with the registry, and compute the Instrumentation Score; about a minute
	$(RUN) python -m tests.score

replicas: $(VENV) $(MLFLOW) ## Prove that three replicas behind a balancer act as one; ARGS=--write keeps it
	$(RUN) MLFLOW_BIN="$(CURDIR)/.venv-mlflow/bin/mlflow" python -m tests.bench.replicas $(ARGS)

# Not a part of `test`: Go, Rust and Java build for minutes, and two coding agents are 700 MB. What this machine has
# no toolchain for is left out, and named; in CI nothing may be. The environment is the caller's: cargo's, npm's and
# Maven's own variables may name their registries.
clients: $(VENV) $(LITELLM) $(CLIENTS) ## Play the clients that people use against a real LiteLLM; ARGS=--write keeps it, ARGS=rust plays one
	@$(CLIENTS_PYTHONS) .venv/bin/python -m tests.e2e.clients \
		--folder "$${XDG_CACHE_HOME:-$$HOME/.cache}/llmops-api-clients" $(ARGS)

# The gateways that it is measured beside; where npm is not, without the one from there.
PORTKEY := .bench/node_modules/.packages
bench: $(VENV) $(LITELLM) $(if $(shell command -v npm 2>/dev/null),$(PORTKEY)) ## Measure beside LiteLLM, Portkey and plain FastAPI, 15 minutes; ARGS=--write keeps it
	$(RUN) python -m tests.bench --litellm .venv-litellm/bin/litellm $(ARGS)

$(PORTKEY): Makefile
	npm install --prefix .bench --silent --no-save --no-audit --no-fund --ignore-scripts @portkey-ai/gateway@1.15.2
	@touch $@

# ---- The stack (docker-compose.yml, otel/, grafana/) ----

COLLECTOR_BUILDER_VERSION := 0.161.0
GO := $(shell command -v go 2>/dev/null)
STACK := .stack/bin/otelcol .stack/bin/prometheus .stack/bin/promtool .stack/bin/compose-config
KUBERNETES_VERSION := 1.37.2
GATEWAY_API_VERSION := 1.6.3
KEDA_VERSION := 2.21.0
CHART := .stack/bin/helm .stack/kubernetes/.schemas

env: ## Write what docker compose needs to .env: new secrets, where there are none
	@$(firstword $(PYTHON) python3) -m deploy.env_file

chart-schema: $(VENV) ## Write the names and types of the settings to the Helm chart's schema
	$(RUN) python -m deploy.chart_schema

helm-test: $(if $(GO),$(CHART) $(VENV)) ## Prove the Helm chart alone; needs Go
ifdef GO
	$(PYTEST) -m stack $(or $(ARGS),tests/helm)
else
	@echo "No Go here, so Helm was not built, and tests/helm was left out. Install Go >= 1.26." >&2
	@test -z "$$CI" # there, nothing may be left out
endif

# Not a part of `check`: the API server builds for several minutes.
chart-test: $(CHART) .stack/bin/etcd .stack/bin/kube-apiserver .stack/bin/kubectl $(VENV) ## Install the Helm chart at a real API server that runs nothing; needs Go
	.venv/bin/python -m tests.helm.apiserver

dashboards: $(VENV) ## Write grafana/dashboards/, otel/registry/ and the table in otel/README.md
	$(RUN) python -m grafana

# These are as large as a small service, so a machine without Go leaves them out, and says so.
stack-test: $(if $(GO),stack-programs $(VENV) $(LITELLM) $(MLFLOW)) ## Prove the stack with a real collector and Prometheus, and the chart with Helm; needs Go
ifdef GO
	$(PYTEST) $(RERUN) -m stack $(or $(ARGS),tests/stack tests/helm)
else
	@echo "No Go here, so the collector, Prometheus and Helm were not built, and tests/stack and tests/helm were left out:" >&2
	@echo "no query, rule or alert was run, nor the rules' unit tests, and no chart was rendered. Install Go >= 1.26." >&2
	@test -z "$$CI" # there, nothing may be left out
endif

demo-stack: stack-programs $(VENV) $(LITELLM) $(MLFLOW) ## The demo with a real collector and Prometheus; needs Go, no Docker
	@.venv/bin/python -m deploy.demo_stack $(ARGS)

# Not a part of `test`: it needs root, Podman and ten minutes.
# The environment is the caller's: pip's own variables may name the package index.
compose-test: $(VENV) ## Prove docker-compose.yml in containers; needs root and Podman; ARGS=--write keeps it
	@.venv/bin/python -m tests.compose --can
	@$(MAKE) --no-print-directory .venv-compose/.packages stack-programs
	.venv/bin/python -m tests.compose $(ARGS)

stack-programs: $(STACK) $(CHART)

.stack/bin/otelcol: otel/build/collector.yaml
	@echo "Building the collector (once, a few minutes)"
	@mkdir -p $(@D)
	GOBIN="$(CURDIR)/.stack/bin" go install go.opentelemetry.io/collector/cmd/builder@v$(COLLECTOR_BUILDER_VERSION)
	rm -rf .stack/collector
	CGO_ENABLED=0 .stack/bin/builder --config $< > .stack/collector.log 2>&1 || { tail -n 20 .stack/collector.log; exit 1; }
	mv .stack/collector/otelcol $@

# Without the discovery of targets in clouds: a quarter of the time, and nothing here uses it.
.stack/bin/prometheus .stack/bin/promtool: otel/build/prometheus/go.mod otel/build/prometheus/go.sum
	@echo "Building $(@F) (once, a few minutes)"
	@mkdir -p $(@D)
	cd otel/build/prometheus && CGO_ENABLED=0 go build -trimpath -tags remove_all_sd -o "$(CURDIR)/$@" \
		github.com/prometheus/prometheus/cmd/$(@F)

.stack/bin/compose-config: otel/build/compose/main.go otel/build/compose/go.mod otel/build/compose/go.sum
	@mkdir -p $(@D)
	cd otel/build/compose && CGO_ENABLED=0 go build -trimpath -o "$(CURDIR)/$@" .

.stack/bin/helm: otel/build/helm/go.mod otel/build/helm/go.sum
	@echo "Building Helm (once, a few minutes)"
	@mkdir -p $(@D)
	cd otel/build/helm && CGO_ENABLED=0 go build -trimpath -o "$(CURDIR)/$@" helm.sh/helm/v4/cmd/helm

.stack/bin/etcd: PACKAGE := go.etcd.io/etcd/server/v3
.stack/bin/kube-apiserver: PACKAGE := k8s.io/kubernetes/cmd/kube-apiserver
.stack/bin/kubectl: PACKAGE := k8s.io/kubernetes/cmd/kubectl
.stack/bin/etcd .stack/bin/kube-apiserver .stack/bin/kubectl: otel/build/kubernetes/go.mod otel/build/kubernetes/go.sum
	@echo "Building $(@F) (once, some minutes)"
	@mkdir -p $(@D)
	cd otel/build/kubernetes && CGO_ENABLED=0 go build -trimpath -o "$(CURDIR)/$@" \
		-ldflags "-X k8s.io/component-base/version.gitVersion=v$(KUBERNETES_VERSION)" $(PACKAGE)

# What an API server would accept: the schemas of Kubernetes, of the Gateway API and of KEDA, from their modules.
.stack/kubernetes/.schemas: Makefile
	@echo "Getting the schemas of Kubernetes (once)"
	@mkdir -p $(@D)
	@cd $(@D) && for file in \
		k8s.io/kubernetes@v$(KUBERNETES_VERSION):api/openapi-spec/swagger.json \
		sigs.k8s.io/gateway-api@v$(GATEWAY_API_VERSION):config/crd/standard/gateway.networking.k8s.io_httproutes.yaml \
		github.com/kedacore/keda/v2@v$(KEDA_VERSION):config/crd/bases/keda.sh_scaledobjects.yaml; do \
		go mod download "$${file%%:*}" && \
		install -m 644 "$$(go list -m -f '{{.Dir}}' "$${file%%:*}")/$${file#*:}" . || exit 1; \
	done
	@touch $@

UV_COMPILE = .venv-lock/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 \
	--prerelease if-necessary-or-explicit --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links $(if $(UPGRADE),--upgrade)

lock: .venv-lock/.packages ## Write the lock files; UPGRADE=1 takes newer versions
	$(UV_COMPILE) --output-file requirements.lock pyproject.toml
	$(UV_COMPILE) --constraint requirements.lock --group dev --output-file requirements-dev.lock pyproject.toml
	$(UV_COMPILE) --output-file deploy/litellm/requirements.lock deploy/litellm/requirements.in
	$(UV_COMPILE) --output-file deploy/mlflow/requirements.lock deploy/mlflow/requirements.in
	$(UV_COMPILE) --output-file tests/e2e/clients/requirements.lock tests/e2e/clients/requirements.in
	$(UV_COMPILE) --output-file tests/e2e/clients/requirements-openai2.lock tests/e2e/clients/requirements-openai2.in
	$(UV_COMPILE) --output-file tests/compose/requirements.lock tests/compose/requirements.in
	cd tests/e2e/clients/node && npm $(if $(UPGRADE),update,install) --package-lock-only --silent --no-audit --no-fund
	cd tests/e2e/clients/agents && npm install --package-lock-only --silent --no-audit --no-fund

clean: ## Remove everything that make made; .env stays
	rm -rf .venv .venv-litellm .venv-mlflow .venv-clients .venv-clients-openai2 .venv-compose tests/e2e/clients/node/node_modules .venv-lock
	rm -rf .bench .demo .stack .coverage .coverage.* htmlcov
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .schemathesis
	find deploy grafana service tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.packages: requirements-dev.lock
	@echo "Installing the service's packages into .venv (once, about half a minute)"
	$(call new_venv,.venv)
	@.venv/bin/python $(PIP_INSTALL_LOCK) -r requirements-dev.lock
	@touch $@

$(VENV): .venv/.packages pyproject.toml
	@.venv/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(LITELLM): deploy/litellm/requirements.lock
	@echo "Installing LiteLLM into .venv-litellm (once, about a minute)"
	$(call new_venv,.venv-litellm)
	@.venv-litellm/bin/python $(PIP_INSTALL_LOCK) -r deploy/litellm/requirements.lock
	@touch $@

$(MLFLOW): deploy/mlflow/requirements.lock
	@echo "Installing MLflow into .venv-mlflow (once, about a minute)"
	$(call new_venv,.venv-mlflow)
	@.venv-mlflow/bin/python $(PIP_INSTALL_LOCK) -r deploy/mlflow/requirements.lock
	@touch $@

.venv-clients/.packages: tests/e2e/clients/requirements.lock
	@echo "Installing clients to test with into .venv-clients (once, about half a minute)"
	$(call new_venv,.venv-clients)
	@.venv-clients/bin/python $(PIP_INSTALL_LOCK) -r tests/e2e/clients/requirements.lock
	@touch $@

.venv-clients-openai2/.packages: tests/e2e/clients/requirements-openai2.lock
	@echo "Installing clients that need an older library of OpenAI's into .venv-clients-openai2 (once)"
	$(call new_venv,.venv-clients-openai2)
	@.venv-clients-openai2/bin/python $(PIP_INSTALL_LOCK) -r tests/e2e/clients/requirements-openai2.lock
	@touch $@

.venv-compose/.packages: tests/compose/requirements.lock
	@echo "Installing podman-compose into .venv-compose (once)"
	$(call new_venv,.venv-compose)
	@.venv-compose/bin/python $(PIP_INSTALL_LOCK) -r tests/compose/requirements.lock
	@touch $@

tests/e2e/clients/node/node_modules/.packages: tests/e2e/clients/node/package-lock.json
	@cd tests/e2e/clients/node && npm ci --silent --no-audit --no-fund --ignore-scripts
	@touch $@

.venv-lock/.packages: Makefile
	$(call new_venv,.venv-lock)
	@.venv-lock/bin/python $(PIP_INSTALL) uv==$(UV_VERSION)
	@touch $@
