# Build, try and test Enclos. `make help` lists the targets.

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
SHIM := build/spank_enclos.so

DESTDIR ?=
PLUGIN ?= yes
prefix ?= /usr/local
sysconfdir ?= /etc
unitdir ?= $(prefix)/lib/systemd/system
mandir ?= $(prefix)/share/man
libdir := $(prefix)/lib/enclos

SPANK_SOURCES := $(wildcard spank/*.c spank/*.h spank/*.lds spank/Makefile)
CFFI_SOURCES := $(wildcard runtime/linux/*.[ch] runtime/linux/build.py runtime/squash/*.[ch] runtime/squash/build.py)
MYPY_ROOT := build/mypy
RELEASES ?= 24.11 26.05
# exclusive: the newest, with RDMA devices that move between network namespaces.
GUESTS ?= new 6.1 exclusive

.DELETE_ON_ERROR:
.PHONY: all help deps demo test test-here test-unit test-kernel test-cluster test-releases test-vm test-vm-all lint bench install clean

all: deps build/.venv-stamp build/.cffi-stamp $(SHIM) ## build everything: packages, virtual environment, plugin

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## install the Debian packages that are missing (as root)
	@.ci/install-packages

# The virtual environment. The package is installed editable: `enclos`, `enclosd` and `enclos-cluster` run this checkout.
build/.venv-stamp: pyproject.toml setup.py | deps
	@mkdir -p build
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,bench,fast]'
	@touch $@ build/.cffi-stamp

# The cffi modules: the system calls that Python lacks, and libsquashfs; the first time pip has built them.
build/.cffi-stamp: $(CFFI_SOURCES) | build/.venv-stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# The Slurm plugin, for the Slurm of this machine.
$(SHIM): $(SPANK_SOURCES) | deps
	@mkdir -p build
	$(MAKE) --no-print-directory -C spank

demo: all ## the main job on a fresh two-node cluster, as root
	@$(BIN)/enclos-cluster demo

test: all lint ## lint, then all tests: here, on other releases of Slurm, on other kernels; as root
	@$(MAKE) --no-print-directory --keep-going test-here test-releases test-vm

test-here:
	@tests/part here tests/unit tests/kernel tests/cluster

test-unit: all ## unit tests only: seconds, no root
	@$(BIN)/pytest tests/unit

test-kernel: all ## tests with namespaces of their own, as root
	@$(BIN)/pytest tests/kernel

test-cluster: all ## tests on a real Slurm, as root
	@$(BIN)/pytest tests/cluster

# The first time, debootstrap makes a root of each release's Debian, in /var/cache/enclos-cluster: a minute each.
test-releases: all ## what depends on Slurm's release, on the other two, as root
	@status=0; for release in $(RELEASES); do \
	    echo "== Slurm $$release"; \
	    tests/part "slurm-$$release" tests/cluster -m releases --slurm "$$release" || status=1; \
	done; exit $$status

# The first time, the kernels are downloaded, to /var/cache/enclos-vm: a minute.
test-vm: all ## the tests marked for guests in qemu: two kernels, RDMA that moves, Slurm's releases; as root
	@tests/part vm tests/vm
	@status=0; for kernel in $(GUESTS); do \
	    echo "== Linux $$kernel"; \
	    tests/part --kernel "$$kernel" "vm-$$kernel" || status=1; \
	done; for release in $(RELEASES); do \
	    echo "== Slurm $$release on cgroup v2"; \
	    tests/part --kernel new --slurm "$$release" "vm-slurm-$$release" || status=1; \
	done; exit $$status

test-vm-all: all ## every kernel and cluster test on the newest Linux, in qemu: takes hours
	@tests/vm/vm --kernel new --timeout 28800 test tests/kernel tests/cluster

# mypy wants to find `enclos.runtime` below a folder `enclos`; the checkout has `runtime/` (setup.py maps it).
lint: build/.venv-stamp ## ruff and mypy --strict
	@mkdir -p $(MYPY_ROOT)/enclos
	@ln -sfn ../../../runtime $(MYPY_ROOT)/enclos/runtime
	@ln -sfn ../../../netns $(MYPY_ROOT)/enclos/netns
	@ln -sfn ../../../enclos/__init__.py $(MYPY_ROOT)/enclos/__init__.py
	@$(BIN)/ruff check --quiet .
	@MYPYPATH=$(MYPY_ROOT) $(BIN)/mypy --no-error-summary -p enclos
	@MYPYPATH=$(MYPY_ROOT) $(BIN)/mypy --no-error-summary tests

bench: all ## all benchmarks, as root; the report is in build/benchmarks
	@$(BIN)/python -m benchmarks

# Without Slurm there is nothing to build a plugin against: `make install PLUGIN=no`.
ifeq ($(PLUGIN),no)
INSTALLED := build/spank/environ
build/spank/environ: $(SPANK_SOURCES)
	$(MAKE) --no-print-directory -C spank $(abspath $@)
else
INSTALLED := $(SHIM)
endif

install: $(INSTALLED) ## install for a site: DESTDIR=, prefix=/usr/local, sysconfdir=/etc, PLUGIN=no without Slurm
	install -d $(DESTDIR)$(prefix)/bin $(DESTDIR)$(libdir) $(DESTDIR)$(sysconfdir)/enclos $(DESTDIR)$(unitdir)
	$(PYTHON) -m venv build/install-venv
	build/install-venv/bin/pip install --quiet --disable-pip-version-check --upgrade --target $(DESTDIR)$(libdir)/python '.[fast]'
	rm -rf $(DESTDIR)$(libdir)/python/bin
	set -e; for row in enclos:cli.main enclosd:daemon enclos-cluster:cluster.main; do \
	    program=$(DESTDIR)$(prefix)/bin/$${row%%:*}; \
	    printf '#!%s -I\nimport sys\nsys.path.insert(0, "%s")\nfrom enclos.runtime.%s import main\nsys.exit(main())\n' \
	        '$(PYTHON)' '$(libdir)/python' "$${row#*:}" > "$$program"; \
	    chmod 755 "$$program"; \
	done
	install -m 755 build/spank/environ $(DESTDIR)$(libdir)/
	test '$(PLUGIN)' = no || install -m 755 $(SHIM) build/slurm-command build/slurm-opened.so $(DESTDIR)$(libdir)/
	test -e $(DESTDIR)$(sysconfdir)/enclos/enclos.yaml || install -m 644 conf/enclos.yaml $(DESTDIR)$(sysconfdir)/enclos/
	sed 's|^ExecStart=.*|ExecStart=$(prefix)/bin/enclosd|' conf/enclosd.service > $(DESTDIR)$(unitdir)/enclosd.service
	install -D -m 644 -t $(DESTDIR)$(prefix)/lib/udev/rules.d conf/60-enclos.rules
	install -D -m 644 conf/completion/enclos.bash $(DESTDIR)$(prefix)/share/bash-completion/completions/enclos
	# Where Slurm's own completion is, as with prefix=/usr, it stays as it is.
	set -e; for command in srun sbatch salloc; do \
	    file=$(DESTDIR)$(prefix)/share/bash-completion/completions/$$command; \
	    if [ ! -e "$$file" ] || grep -q _enclos_srun "$$file"; then \
	        install -D -m 644 conf/completion/enclos-srun.bash "$$file"; \
	    fi; \
	done
	install -D -m 644 -t $(DESTDIR)$(prefix)/share/zsh/site-functions conf/completion/_enclos
	for page in docs/man/*.[1-8]; do install -D -m 644 -t $(DESTDIR)$(mandir)/man$${page##*.} "$$page"; done
	@test '$(PLUGIN)' = no || echo 'plugstack.conf: required $(libdir)/spank_enclos.so'

clean: ## remove what was built; the virtual environment stays
	rm -rf build runtime/linux/_linux*.so runtime/linux/_linux.c runtime/squash/_squash*.so runtime/squash/_squash.c *.egg-info
