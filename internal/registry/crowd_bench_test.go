// This file measures what is asked of a registry with 100 000 connections. What that
// does to messages meanwhile is measured in package session.
//
//	go test -run '^$' -bench HundredThousand -count 10 ./internal/registry/

package registry

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func BenchmarkHundredThousand(b *testing.B) {
	r, conns := bigCrowd(b, crowdSize)
	reg := prometheus.NewPedanticRegistry()
	for _, c := range r.Collectors() {
		reg.MustRegister(c)
	}
	route := conns[0].Route()
	list := func(f Filter, after string, want int) func(b *testing.B) {
		return func(b *testing.B) {
			if page, _ := r.List(f, 1000, after); len(page) != want {
				b.Fatalf("got %d connections, want %d", len(page), want)
			}
		}
	}
	for _, bb := range []struct {
		name string
		do   func(b *testing.B)
	}{
		{"first page", list(Filter{}, "", 1000)},
		{"middle page", list(Filter{}, conns[crowdSize/2].ID(), 1000)},
		{"last page", list(Filter{}, conns[crowdSize-1001].ID(), 1000)},
		{"page of one", list(Filter{Client: "10.1.0.1"}, "", 1)},
		{"page of none", list(Filter{Route: "none"}, "", 0)},
		{"stats", func(*testing.B) { r.Stats() }},
		{"sweep", func(*testing.B) { r.Sweep() }},
		{"upstreams", func(*testing.B) { r.Upstreams() }},
		{"metrics", func(b *testing.B) {
			if _, err := reg.Gather(); err != nil {
				b.Fatal(err)
			}
		}},
		{"end planned", func(*testing.B) { r.EndSelected(Filter{Route: "route 1"}, time.Hour, Ending{Reason: Admin}) }},
		{"drain planned and lifted", func(*testing.B) {
			r.MovePaced(route, func(up string) bool { return up == "app1:80" }, time.Hour)
			r.MovePaced(route, func(string) bool { return false }, time.Hour)
		}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				bb.do(b)
			}
		})
	}
	r.SetLimits(Limits{PerIP: new(1000)}, 0)
	b.Run("admitted and done, per IP", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			admitFrom(b, r, route, "10.1.0.1").Done()
		}
	})
}
