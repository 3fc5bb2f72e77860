# Needs Go, git, make and a C compiler. Everything else is pinned in
# internal/test/tools and internal/test/stack, comes from the Go module proxy and is kept
# in Go's build cache.

FOLDERS := $(wildcard cmd examples internal jobs runtime scheduler)
MODULES := $(dir $(wildcard go.mod examples/*/go.mod))
PROTO   := runtime/plugin/proto

# $(call tool,NAME) runs the tool that internal/test/tools/NAME pins.
tool = go tool -modfile=$(CURDIR)/internal/test/tools/$(1)/go.mod $(1)

# $(call each,COMMAND) runs COMMAND in each module, and fails if one failed.
each = @$(in-each)
in-each = failed=0; for m in $(MODULES); do (cd $$m && $(1)) || failed=1; done; exit $$failed

.PHONY: help
help: ## Print what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

# -buildvcs writes the commit into the binary where there is one.
.PHONY: build
build: ## Build bin/bivouac
	CGO_ENABLED=0 go build -buildvcs=auto -o bin/bivouac ./cmd/bivouac

# The tag of the image, and the certificates of public authorities that it gets.
IMAGE ?= bivouac:dev
CA_CERTIFICATES ?= $(firstword $(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem))

# A docker command without its builder plugin has an older builder.
.PHONY: image
image: ## Build the container image IMAGE, with docker
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	CGO_ENABLED=0 GOOS=linux go build -trimpath -buildvcs=auto -o "$$folder/bivouac" ./cmd/bivouac; \
	cp LICENSE "$$folder"; cp "$(CA_CERTIFICATES)" "$$folder/ca-certificates.crt"; \
	mkdir -m 1777 "$$folder/tmp"; tar -C "$$folder" -cf "$$folder/tmp.tar" tmp; \
	docker buildx version >/dev/null 2>&1 || export DOCKER_BUILDKIT=0; \
	docker build -q -t "$(IMAGE)" -f examples/deploy/Dockerfile "$$folder"

RELEASE   := bin/release
PLATFORMS ?= linux_amd64 linux_arm64 darwin_amd64 darwin_arm64

# The same commit and Go make the same bytes, whatever the folder. Packages and archives
# get the time of the commit.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
.PHONY: $(PLATFORMS:%=bin/%/bivouac)
$(PLATFORMS:%=bin/%/bivouac): bin/%/bivouac:
	GOFLAGS= CGO_ENABLED=0 GOOS=$(word 1,$(subst _, ,$*)) GOARCH=$(word 2,$(subst _, ,$*)) \
		go build -trimpath -buildvcs=true -o $@ ./cmd/bivouac

# $(call version,BINARY) is a shell command that prints the version that Go recorded. Go
# records none in a git worktree; it is 0 then.
version = go version -m $(1) | awk '$$1 == "mod" {v = $$3; sub(/^v/, "", v); print v == "(devel)" ? 0 : v}'

.PHONY: packages
packages: $(patsubst %,bin/%/bivouac,$(filter linux_%,$(PLATFORMS))) ## Build deb and rpm packages in bin/release
	@set -e; rm -rf $(RELEASE); mkdir -p $(RELEASE); \
	export BINARY ARCH VERSION=$$($(call version,$<)); \
	for BINARY in $^; do ARCH=$${BINARY#bin/linux_} ARCH=$${ARCH%/bivouac}; for kind in deb rpm; do \
		$(call tool,nfpm) package --config examples/deploy/nfpm.yaml --packager $$kind --target $(RELEASE)/; \
	done; done

# It needs GNU tar. The SBOM has the checksum of the tool that wrote it, hence -trimpath.
.PHONY: release
release: $(PLATFORMS:%=bin/%/bivouac) packages ## Build all that a release has in bin/release: archives, packages, SBOMs, checksums
	@set -e; version=$$($(call version,$<)); \
	case $$version in 0 | *+dirty) echo "a release needs a clone in which all is committed" >&2; exit 1;; esac; \
	for platform in $(PLATFORMS); do \
		name=$(RELEASE)/bivouac_$${version}_$$platform; \
		tar -c --format=ustar --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --mtime=@$$SOURCE_DATE_EPOCH \
			LICENSE README.md CHANGELOG.md -C bin/$$platform bivouac | gzip -n >$$name.tar.gz; \
		GOFLAGS=-trimpath $(call tool,cyclonedx-gomod) bin -json -noserial -notimestamp -output $$name.cdx.json bin/$$platform/bivouac; \
	done; \
	cd $(RELEASE); sha256sum -- * >SHA256SUMS

.PHONY: check-release
check-release: release ## Build the release a second time, from a clone in another folder, and compare
	@set -e; again=$$(mktemp -d); trap 'rm -rf "$$again"' EXIT; \
	git clone -q . "$$again/bivouac"; \
	$(MAKE) --no-print-directory -C "$$again/bivouac" release; \
	diff $(RELEASE)/SHA256SUMS "$$again/bivouac/$(RELEASE)/SHA256SUMS"; \
	echo "Both builds have the same bytes:"; cat $(RELEASE)/SHA256SUMS

.PHONY: dev
dev: build ## Run a server that needs neither Nomad nor Consul, until Ctrl-C
	@bin/bivouac agent -dev

.PHONY: test
test: ## Run the tests that need no servers, in a few minutes
	go test -short -race -timeout 5m ./...
	@echo "NOT RUN: tests on real Nomad, Consul and Docker, plugin examples, the longer simulation, chaos. Run all with: make test-all"

# The tests of the main module also build and verify the modules in examples. Tests
# on real servers mostly wait, so more of them run at a time than there are CPUs. Of at
# most 10 that fail, each runs once more; bin/failed-once.txt tells which, and how often.
.PHONY: test-all
test-all: servers ## Run everything on real servers; with CI=true no test may be skipped
	@mkdir -p bin && rm -f bin/failed-once.txt
	$(call tool,gotestsum) --format standard-quiet \
		--post-run-command $(CURDIR)/internal/test/tools/gotestsum/no-skips.sh \
		--rerun-fails=1 --rerun-fails-run-root-test --rerun-fails-abort-on-data-race --rerun-fails-report bin/failed-once.txt \
		--packages ./... -- -race -timeout 20m -parallel 4 $(if $(CI),-count=1)
	@[ ! -e bin/failed-once.txt ] || { echo "Failed once, passed when run again:"; cat bin/failed-once.txt; }
	$(MAKE) --no-print-directory simulate RUNS=2000
	$(MAKE) --no-print-directory chaos DURATION=3m

.PHONY: servers
servers: ## Build the Nomad and Consul that PATH lacks, into the user's cache
	go run ./internal/test/stack/prepare

# DURATION= and SEED= choose another run than the full one, in which each fault
# comes at least 20 times.
.PHONY: chaos
chaos: ## Break a running Bivouac in every way for half an hour or more, and count what it does wrong
	go run ./internal/test/chaos $(if $(DURATION),-duration=$(DURATION) -times=0) $(if $(SEED),-seed=$(SEED))

RUNS ?= 10000
.PHONY: simulate
simulate: ## Run RUNS simulations of replicas under faults, from seed FROM on; SEED=n shows one
	SEED=$(SEED) FROM=$(FROM) RUNS=$(RUNS) go test -count=1 -timeout 60m -v -run TestSimulations ./internal/test/simulate

# It fails where one is not noticed. SEEDS= is how many are tried for each.
.PHONY: mutants
mutants: ## Take each safeguard away, and see what seed or test notices
	go run ./internal/test/mutants $(if $(SEEDS),-seeds=$(SEEDS))

.PHONY: stack
stack: ## Run Bivouac on a real Consul and a real Nomad, until Ctrl-C
	go build -o bin/stack ./internal/test/stack/up
	@exec bin/stack

.PHONY: bench
bench: ## Measure Bivouac beside raw Nomad and docker; also written to bin/bench.json
	@mkdir -p bin
	go run ./internal/test/bench -json=bin/bench.json

# It needs some 17 GB of memory and ten minutes on a quiet machine. RECORDS= is how many.
.PHONY: million
million: ## Measure Bivouac with a million sessions in a real Consul
	@mkdir -p bin
	go build -o bin/million ./internal/test/million
	bin/million $(if $(RECORDS),-records=$(RECORDS))

.PHONY: fmt
fmt: ## Format all Go files
	$(call each,$(call tool,golangci-lint) fmt --config $(CURDIR)/.golangci.yml)

# For a release add -descriptors=$(CURDIR)/$(PROTO)/released.binpb.
.PHONY: proto
proto: ## Generate the Go code of the plugin protocol
	go -C internal/test/tools/protoc run . $(CURDIR)/$(PROTO) $(CURDIR)/$(PROTO)

.PHONY: check
check: check-format check-lint check-proto check-tidy check-vulnerabilities ## Check all that can be checked without running it

.PHONY: check-format
check-format:
	@unformatted=$$(gofmt -l $(FOLDERS)) && if [ -n "$$unformatted" ]; then \
		echo "make fmt would change:" >&2; echo "$$unformatted" >&2; exit 1; fi

# go vet is among the linters.
.PHONY: check-lint
check-lint:
	$(call each,$(call tool,golangci-lint) run --config $(CURDIR)/.golangci.yml ./...)

.PHONY: check-proto
check-proto:
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	go -C internal/test/tools/protoc run . $(CURDIR)/$(PROTO) "$$fresh"; \
	for f in "$$fresh"/v1/*; do cmp "$$f" "$(PROTO)/v1/$${f##*/}" || { echo "make proto has something to do" >&2; exit 1; }; done

.PHONY: check-tidy
check-tidy:
	$(call each,go mod tidy -diff)

# GOVULNDB names another copy of the database, by its URL; that one must answer.
# Where Go's own cannot be reached, nothing can be said, and that is said: -version
# tells when it was updated, unless it cannot be reached.
.PHONY: check-vulnerabilities
check-vulnerabilities: govulncheck = $(call tool,govulncheck) $(if $(GOVULNDB),-db $(GOVULNDB))
check-vulnerabilities:
	@about=$$($(govulncheck) -version) || exit 1; \
	if [ -n "$(GOVULNDB)" ] || echo "$$about" | grep -q '^DB updated:'; then \
		$(call in-each,$(govulncheck) ./...); \
	else \
		echo "NOT CHECKED for known vulnerabilities: https://vuln.go.dev cannot be reached; see GOVULNDB" >&2; \
	fi
