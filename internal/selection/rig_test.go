// This file has the pool of upstreams that the tests choose from.

package selection

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// rig is a policy and what it chooses from. Each connection stays until the test
// takes it from the counts.
type rig struct {
	t          *testing.T
	policy     *Policy
	candidates []Candidate
}

// newRig has n upstreams, all available.
func newRig(t *testing.T, raw string, n int) *rig {
	t.Helper()
	return rigWith(t, mustLoad(t, raw, false), n)
}

// newBlindRig has a policy as with a version of Caddy that it does not know.
func newBlindRig(t *testing.T, raw string, n int) *rig {
	t.Helper()
	return rigWith(t, mustLoad(t, raw, true), n)
}

func rigWith(t *testing.T, policy *Policy, n int) *rig {
	t.Helper()
	r := &rig{t: t, policy: policy}
	for i := range n {
		r.candidates = append(r.candidates, Candidate{Upstream: NewUpstream(fmt.Sprintf("10.0.0.%d:80", i+1)), Available: true})
	}
	return r
}

func mustLoad(t *testing.T, raw string, blind bool) *Policy {
	t.Helper()
	policy, err := load(testContext(t), json.RawMessage(raw), blind)
	if err != nil {
		t.Fatal(err)
	}
	return policy
}

func testContext(t *testing.T) caddy.Context {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	return ctx
}

// connect lets the policy choose, counts the connection, and fails the test if
// there is none or if it is at an unavailable upstream.
func (r *rig) connect(req *http.Request) (int, http.Header) {
	r.t.Helper()
	i, header := r.policy.Choose(r.candidates, req)
	if i < 0 {
		r.t.Fatal("got no upstream, want one")
	}
	if !r.candidates[i].Available {
		r.t.Fatalf("got upstream %d, want one that is available", i)
	}
	r.candidates[i].Conns++
	return i, header
}

// connections connects n times with requests of no importance and returns the
// counts.
func (r *rig) connections(n int) []int {
	r.t.Helper()
	for range n {
		r.connect(request("/"))
	}
	return r.counts()
}

func (r *rig) counts() []int {
	counts := make([]int, len(r.candidates))
	for i, c := range r.candidates {
		counts[i] = c.Conns
	}
	return counts
}

// want checks the counts.
func (r *rig) want(counts ...int) {
	r.t.Helper()
	if got := r.counts(); !slices.Equal(got, counts) {
		r.t.Errorf("got counts %v, want %v", got, counts)
	}
}

// spread is the difference between the largest and the smallest count.
func spread(counts []int) int { return slices.Max(counts) - slices.Min(counts) }

// request is one as it comes through Caddy.
func request(target string) *http.Request {
	return Prepare(httptest.NewRequest(http.MethodGet, target, nil), "192.0.2.1", false)
}
