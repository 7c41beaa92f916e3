// This file measures what limits cost.

package registry

import (
	"net/netip"
	"testing"
)

// crowd returns a registry with n live connections, each of another client.
func crowd(b *testing.B, n int) (*Registry, *Route) {
	b.Helper()
	r := New()
	route := r.Retain(WebSocket, "a")
	for i := range n {
		admitFrom(b, r, route, netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}).String())
	}
	return r, route
}

func admitFrom(tb testing.TB, r *Registry, route *Route, client string) *Conn {
	c, err := r.Admit(route, Info{Kind: WebSocket, Client: client}, nil)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

func BenchmarkAdmitAndDone(b *testing.B) {
	const many = 1 << 20
	for _, bb := range []struct {
		name     string
		all, own Limits
		client   string
	}{
		{"no limits", Limits{}, Limits{}, "192.0.2.1"},
		{"in all", Limits{Connections: new(many)}, Limits{Connections: new(many)}, "192.0.2.1"},
		{"per IP", Limits{PerIP: new(many)}, Limits{}, "192.0.2.1"},
		{"per IP, twice", Limits{PerIP: new(many)}, Limits{PerIP: new(many)}, "192.0.2.1"},
		{"per IPv6, twice", Limits{PerIP: new(many)}, Limits{PerIP: new(many)}, "2001:db8::a:b:c:1"},
	} {
		b.Run(bb.name, func(b *testing.B) {
			r, route := crowd(b, 10_000)
			r.SetLimits(bb.all, 0)
			route.SetLimits(bb.own)
			b.ReportAllocs()
			for b.Loop() {
				admitFrom(b, r, route, bb.client).Done()
			}
		})
	}
}

func BenchmarkRefusal(b *testing.B) {
	r, route := crowd(b, 10_000)
	r.SetLimits(Limits{PerIP: new(1)}, 0)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Admit(route, Info{Client: "10.0.0.1"}, nil); err == nil {
			b.Fatal("got a connection admitted, want it refused")
		}
	}
}

// BenchmarkRecount is how long a change of the rules holds the lock.
func BenchmarkRecount(b *testing.B) {
	r, _ := crowd(b, 100_000)
	for b.Loop() {
		r.SetLimits(Limits{PerIP: new(1)}, 64)
		r.SetLimits(Limits{}, 64) // walks nothing
	}
}
