SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VERSION  = $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS  = -s -w -X github.com/signet-overlay/signet/internal/version.Version=$(VERSION)
BUILD    = CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/
TIMEOUT  = 20m
TESTSUM  = bin/testsum
UPTO     ?= 6
FUZZTIME ?= 10s

.PHONY: help build generate check check-generated test test-vm nightly race fuzz bench demo demo-check clean deps

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-16s %s\n", $$1, $$2}'

build: ## build signetd, signet-coordinator and signet into bin/
	$(BUILD) ./cmd/signetd ./cmd/signet-coordinator ./cmd/signet

generate: ## write all generated files anew (needs clang and protoc)
	go generate ./...

check: ## formatting, vet, staticcheck, govulncheck, generated files, house rules
	@bad=$$(gofmt -l .); if [ -n "$$bad" ]; then echo "gofmt would change:"; echo "$$bad"; exit 1; fi
	go vet ./...
	go tool staticcheck ./...
	integration/house/govulncheck.sh
	integration/house/shellcheck.sh
	@$(MAKE) --no-print-directory check-generated
	go test -count=1 ./integration/house/...

check-generated: ## fail when a generated file is not what its source gives
	integration/house/check-generated.sh

# One package at a time: hosts, tunnels and kill loops of several at once would measure each other on two cores.
test: deps $(TESTSUM) ## run every test that this machine can run, and say what it could not
	go test -p 1 -json -count=1 -timeout $(TIMEOUT) ./... | $(TESTSUM)

race: deps $(TESTSUM) ## the same under the race detector
	go test -p 1 -race -json -count=1 -timeout 30m ./... | $(TESTSUM)

test-vm: deps $(TESTSUM) ## the tests that meet the kernel, on Debian's 6.1 and 6.12 in guests
	@rm -rf bin/vm; status=0; \
	SIGNET_VM=$(CURDIR)/bin/vm go test -json -count=1 -timeout 90m -run Matrix ./integration/vm | $(TESTSUM) || status=1; \
	cat bin/vm/summary || true; exit $$status

fuzz: ## every fuzz target for FUZZTIME (default 10s) each
	integration/house/fuzz.sh $(FUZZTIME)

nightly: ## race, every fuzz target for five minutes, test
	@$(MAKE) --no-print-directory race
	@$(MAKE) --no-print-directory fuzz FUZZTIME=5m
	@SIGNET_NIGHTLY=1 SIGNET_PACKETS=10000000 $(MAKE) --no-print-directory test TIMEOUT=60m

bench: deps build ## measure; one JSON line for each figure
	$(BUILD) ./integration/bench ./integration/probe
	bin/bench

demo: deps build ## a coordinator and three hosts on this machine, until Ctrl-C
	$(BUILD) ./integration/demo ./integration/probe
	bin/demo

demo-check: deps build ## the same, asserting every promised outcome up to slice UPTO (default 6)
	$(BUILD) ./integration/demo ./integration/probe
	bin/demo -check -upto=$(UPTO)

clean: ## remove what was built
	rm -rf bin

# Without root nothing can be installed: setup.sh says what is missing, and the tests that need it are listed as not run.
deps:
	@deploy/setup.sh || [ "$$(id -u)" -ne 0 ]

$(TESTSUM): $(wildcard integration/house/testsum/*.go)
	go build -o $@ ./integration/house/testsum
