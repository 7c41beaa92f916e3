// This file tests policies that are not Caddy's.

package selection

import (
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

func init() {
	caddy.RegisterModule(new(probe))
	caddy.RegisterModule(plain{})
	caddy.RegisterModule(notAPolicy{})
}

// probe is a policy that shows what it is given to a function of the test.
type probe struct {
	Unit string `json:"unit,omitempty"`

	choose func(view) int
}

// view is what a policy gets.
type view struct {
	pool reverseproxy.UpstreamPool
	w    http.ResponseWriter
}

func (*probe) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + ".test_probe", New: func() caddy.Module { return new(probe) }}
}

func (p *probe) Provision(caddy.Context) error {
	if p.Unit == "bad" {
		return errors.New("bad unit")
	}
	return nil
}

func (p *probe) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		p.Unit = d.Val()
	}
	return nil
}

func (p *probe) Select(pool reverseproxy.UpstreamPool, _ *http.Request, w http.ResponseWriter) *reverseproxy.Upstream {
	if i := p.choose(view{pool, w}); i >= 0 {
		return pool[i]
	}
	return nil
}

// plain is a policy without options, which reads nothing of a Caddyfile.
type plain struct{ reverseproxy.FirstSelection }

func (plain) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + ".test_plain", New: func() caddy.Module { return new(plain) }}
}

func (*plain) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

// notAPolicy is in the namespace and selects nothing.
type notAPolicy struct{}

func (notAPolicy) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + ".test_none", New: func() caddy.Module { return new(notAPolicy) }}
}

func (*notAPolicy) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

// newProbe has three upstreams and a policy that is choose.
func newProbe(t *testing.T, choose func(view) int) *rig {
	t.Helper()
	r := newRig(t, `{"policy":"test_probe"}`, 3)
	r.policy.selector.(*probe).choose = choose
	return r
}

func TestForeignPolicySeesTheState(t *testing.T) {
	r := newProbe(t, nil)
	want := r.candidates
	r.policy.selector.(*probe).choose = func(v view) int {
		if len(v.pool) != len(want) {
			t.Fatalf("got %d upstreams, want all %d", len(v.pool), len(want))
		}
		for i, u := range v.pool {
			if u.Dial != want[i].theirs.Dial || u.NumRequests() != want[i].Conns || u.Available() != want[i].Available ||
				u.Healthy() != want[i].Available || u.Full() || u.Fails() != 0 {
				t.Errorf("got %s with %d requests, available %v, want %d, %v", u, u.NumRequests(), u.Available(), want[i].Conns, want[i].Available)
			}
		}
		return slices.IndexFunc(v.pool, (*reverseproxy.Upstream).Available)
	}
	for n := range 100 {
		for i := range want {
			want[i].Conns, want[i].Available = n*i, (n+i)%3 != 0
		}
		r.connect(request("/"))
	}
}

func TestForeignPolicyErrsInItsChoice(t *testing.T) {
	for name, choose := range map[string]func(view) int{
		"none":        func(view) int { return -1 },
		"unavailable": func(view) int { return 2 },
		"stranger": func(v view) int {
			v.pool[0] = &reverseproxy.Upstream{Dial: v.pool[0].Dial, Host: new(reverseproxy.Host)}
			return 0
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newProbe(t, choose)
			r.candidates[2].Available = false
			if i, _ := r.policy.Choose(r.candidates, request("/")); i != -1 {
				t.Errorf("got upstream %d, want none", i)
			}
		})
	}
}

// A policy need not expect an empty pool.
func TestForeignPolicyIsNotAskedInVain(t *testing.T) {
	for name, r := range map[string]*rig{
		"no upstream":              newRig(t, `{"policy":"test_probe"}`, 0),
		"blind and none available": newBlindRig(t, `{"policy":"test_probe"}`, 1),
	} {
		r.policy.selector.(*probe).choose = func(view) int {
			t.Errorf("%s: got asked, want not", name)
			return -1
		}
		for i := range r.candidates {
			r.candidates[i].Available = false
		}
		if i, _ := r.policy.Choose(r.candidates, request("/")); i != -1 {
			t.Errorf("%s: got upstream %d, want none", name, i)
		}
	}
}

// A policy may sort what it gets; the next one gets it in order again.
func TestForeignPolicySorts(t *testing.T) {
	r := newProbe(t, func(v view) int {
		if v.pool[0].Dial != "10.0.0.1:80" {
			t.Errorf("got %v first, want the pool in order", v.pool[0])
		}
		slices.Reverse(v.pool)
		return 0
	})
	for range 3 {
		if i, _ := r.connect(request("/")); i != 2 {
			t.Errorf("got upstream %d, want the last", i)
		}
	}
}

// A policy may keep what it gets, to know whether the upstreams are still the same.
func TestForeignPolicyKeepsThePool(t *testing.T) {
	var pools []reverseproxy.UpstreamPool
	r := newProbe(t, func(v view) int {
		pools = append(pools, v.pool)
		return 0
	})
	r.connect(request("/"))
	r.connect(request("/"))
	r.candidates[1], r.candidates[2] = r.candidates[2], r.candidates[1]
	r.connect(request("/"))
	r.candidates = r.candidates[:2]
	r.connect(request("/"))
	if &pools[0][0] != &pools[1][0] {
		t.Error("got another slice with the same upstreams, want the same")
	}
	if slices.Equal(pools[1], pools[2]) || len(pools[0]) != 3 || len(pools[3]) != 2 {
		t.Errorf("got pools %v, want the first as it was and others for other upstreams", pools)
	}
}

func TestForeignPolicyHasItsOwnResponse(t *testing.T) {
	var last http.ResponseWriter
	r := newProbe(t, func(v view) int {
		if v.w == nil || v.w == last {
			t.Errorf("got response %v, want a new one", v.w)
		}
		last = v.w
		v.w.Header().Add("X-Shard", "1")
		v.w.WriteHeader(http.StatusTeapot)
		if n, err := v.w.Write([]byte("abc")); n != 3 || err != nil {
			t.Errorf("writing: got %d and %v, want 3", n, err)
		}
		return 0
	})
	for range 2 {
		if _, header := r.connect(request("/")); len(header) != 1 || len(header["X-Shard"]) != 1 {
			t.Errorf("got header %v, want X-Shard once", header)
		}
	}
	r.policy.selector.(*probe).choose = func(v view) int {
		_ = v.w.Header().Get("X-Shard")
		return 0
	}
	if _, header := r.connect(request("/")); header != nil {
		t.Errorf("got header %v, want none", header)
	}
}

func TestLoadErrors(t *testing.T) {
	for name, c := range map[string]struct{ raw, want string }{
		"unknown":            {`{"policy":"best"}`, `unknown lb_policy "best": want one of client_ip_hash, cookie, first, header, ip_hash,`},
		"no name":            {`{}`, `unknown lb_policy ""`},
		"null":               {`null`, `unknown lb_policy ""`},
		"no object":          {`"random"`, `reading lb_policy`},
		"unknown field":      {`{"policy":"first","choose":2}`, `loading lb_policy "first"`},
		"refused":            {`{"policy":"random_choose","choose":1}`, `loading lb_policy "random_choose"`},
		"refused by foreign": {`{"policy":"test_probe","unit":"bad"}`, `loading lb_policy "test_probe"`},
		"no selector":        {`{"policy":"test_none"}`, `lb_policy "test_none" selects no upstreams`},
		"unknown fallback":   {`{"policy":"cookie","fallback":{"policy":"best"}}`, `loading lb_policy "cookie"`},
		"fallback no object": {`{"policy":"cookie","fallback":[]}`, `reading the fallback of lb_policy`},
		"cookie below query": {`{"policy":"query","key":"k","fallback":{"policy":"cookie"}}`, `lb_policy: "cookie" cannot be a fallback of query or header`},
		"cookie far below":   {`{"policy":"cookie","fallback":{"policy":"header","field":"F","fallback":{"policy":"query","key":"k","fallback":{"policy":"cookie"}}}}`, `"cookie" cannot be`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(testContext(t), json.RawMessage(c.raw))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got error %v, want one with %q", err, c.want)
			}
		})
	}
}

// That Load refuses it is needed as long as Caddy's own does this.
func TestCookieBelowHeaderPanics(t *testing.T) {
	mod, err := testContext(t).LoadModuleByID(namespace+".header", json.RawMessage(`{"field":"F","fallback":{"policy":"cookie"}}`))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if recover() == nil {
			t.Error("got no panic: Caddy lets it set a cookie now, and Load need not refuse it")
		}
	}()
	mod.(reverseproxy.Selector).Select(reverseproxy.UpstreamPool{NewUpstream("a:1").theirs}, request("/"), new(recorder))
}

// A cookie below a cookie sets both, of which each is enough.
func TestCookieBelowCookie(t *testing.T) {
	r := newRig(t, `{"policy":"cookie","name":"a","fallback":{"policy":"cookie","name":"b"}}`, 3)
	if _, header := r.connect(request("/")); len(header["Set-Cookie"]) != 2 {
		t.Errorf("got header %v, want two cookies", header)
	}
}
