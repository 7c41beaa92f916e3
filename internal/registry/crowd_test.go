// This file fills a registry with as many connections as a large site has, without
// sockets, and looks at what must hold then: what anybody asks for is right while
// connections come and go, and the lock is never held for long.

package registry

import (
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
)

// crowdSize is how many connections there are in benchmarks, on crowdRoutes routes with
// crowdUpstreams upstreams each.
const (
	crowdSize      = 100_000
	crowdRoutes    = 4
	crowdUpstreams = 5
)

// smallCrowd is how many there are in tests, which the race detector makes slow. The long
// form of the tests has as many as the benchmarks.
func smallCrowd() int {
	if os.Getenv("HOLDFAST_FULL") == "1" {
		return crowdSize
	}
	return crowdSize / 10
}

// bystander is an owner that does nothing.
type bystander struct{}

func (bystander) End(Ending)  {}
func (bystander) Abort()      {}
func (bystander) Reconsider() {}
func (bystander) Move() error { return nil }

// bigCrowd returns a registry with n open connections, of both kinds and each of another
// client, by age.
func bigCrowd(tb testing.TB, n int) (*Registry, []*Conn) {
	tb.Helper()
	r := New()
	conns := make([]*Conn, n)
	for i := range conns {
		conns[i] = joinCrowd(tb, r, i)
	}
	return r, conns
}

// joinCrowd opens the connection of a client.
func joinCrowd(tb testing.TB, r *Registry, i int) *Conn {
	kind := [...]Kind{WebSocket, Passthrough}[i%2]
	route := r.Retain(kind, fmt.Sprint("route ", i%crowdRoutes))
	c, err := r.Admit(route, Info{
		Kind: kind, Client: fmt.Sprintf("10.%d.%d.%d", i>>16&255, i>>8&255, i&255), Host: "example.com", URI: "/chat", Protocol: "h1",
	}, bystander{})
	if err != nil {
		tb.Error(err)
		return nil
	}
	up := fmt.Sprintf("app%d:80", i/crowdRoutes%crowdUpstreams)
	c.Attempt(choose(route, up), up, time.Time{})
	c.Open("")
	return c
}

// Whoever waits for the lock while all are looked at waits for 1000 of them at most.
func TestALookAtAllLetsTheLockGo(t *testing.T) {
	const conns, most = 5001, 1000
	r, _ := bigCrowd(t, conns)
	looked, let := 0, 0
	r.survey(&r.byAge, "", func(*Conn) bool {
		looked++
		if looked%most == 1 {
			from := looked
			r.after = append(r.after, func() {
				let++
				if looked-from >= most {
					t.Errorf("got %d records looked at before the lock was let go, want %d at most", looked-from+1, most)
				}
				if !r.mu.TryLock() {
					t.Error("got the lock held between two parts, want it free")
					return
				}
				r.mu.Unlock()
			})
		}
		return true
	})
	if looked != conns || let != 6 {
		t.Errorf("got %d records looked at and the lock let go %d times, want %d and 6", looked, let, conns)
	}
}

// While connections come and go, a listing by pages shows each one that lives through it
// once, in order of age, and all totals are of the same connections.
func TestCrowdUnderChurn(t *testing.T) {
	r, conns := bigCrowd(t, smallCrowd())
	stays := make(map[string]bool)
	var leave []*Conn
	for i, c := range conns {
		if i%3 == 0 {
			leave = append(leave, c)
		} else {
			stays[c.ID()] = true
		}
	}
	quit := make(chan struct{})
	var churn sync.WaitGroup
	for part := range 2 {
		churn.Go(func() { churnCrowd(t, r, leave[part*len(leave)/2:(part+1)*len(leave)/2], quit) })
	}
	seen := make(map[string]int)
	after, last := "", ""
	for pages := 0; ; pages++ {
		page, next := r.List(Filter{}, 100, after)
		for _, v := range page {
			if v.ID <= last {
				t.Fatalf("got %s after %s, want order of age", v.ID, last)
			}
			last = v.ID
			seen[v.ID]++
		}
		if pages%10 == 0 {
			wantSums(t, r.Stats(), len(stays))
		}
		if after = next; after == "" {
			break
		}
	}
	r.Sweep()
	gatherer(t, r)
	close(quit)
	churn.Wait()
	for id, n := range seen {
		if n > 1 {
			t.Errorf("got %s %d times, want once", id, n)
		}
		delete(stays, id)
	}
	if len(stays) > 0 {
		t.Errorf("got %d connections that lived through the listing not in it", len(stays))
	}
	r.EndSelected(Filter{}, 0, Ending{Reason: Admin})
	for _, c := range r.live(&r.byAge) {
		c.Done()
	}
	if n := r.Len(); n != 0 || len(r.byAge.slots) > 65 {
		t.Errorf("got %d connections in %d slots after all, want none", n, len(r.byAge.slots))
	}
}

// churnCrowd owns connections: it ends one after the other, each followed by a new one,
// which ends soon after. quit ends it.
func churnCrowd(t *testing.T, r *Registry, conns []*Conn, quit <-chan struct{}) {
	var young []*Conn
	for i := 0; ; i++ {
		select {
		case <-quit:
			return
		default:
		}
		if i < len(conns) {
			finish(conns[i], Idle)
		}
		young = append(young, joinCrowd(t, r, i))
		if len(young) > 100 {
			finish(young[0], ClientGone)
			young = young[1:]
		}
	}
}

// wantSums checks that the totals are of the same connections, of which there are some
// at least.
func wantSums(t *testing.T, s Stats, least int) {
	t.Helper()
	sum := func(counts ...int) (n int) {
		for _, c := range counts {
			n += c
		}
		return n
	}
	for name, got := range map[string]int{
		"by_kind":     sum(slices.Collect(maps.Values(s.ByKind))...),
		"by_route":    sum(slices.Collect(maps.Values(s.ByRoute))...),
		"by_state":    sum(slices.Collect(maps.Values(s.ByState))...),
		"age_seconds": s.AgeSeconds.LE["+Inf"],
	} {
		if got != s.Total {
			t.Errorf("%s: got %d in all, want the total, %d", name, got, s.Total)
		}
	}
	if at := sum(slices.Collect(maps.Values(s.ByUpstream))...); s.Total < least || at > s.Total || at < least {
		t.Errorf("got %d connections, %d of them at upstreams, want %d at least", s.Total, at, least)
	}
}

// A record costs little beside its connection's own memory, also if there are many, and
// nothing is left of it.
func TestMemoryOfRecords(t *testing.T) {
	const most = 1500 // bytes
	New().Retain(WebSocket, "a")
	before := heap()
	n := smallCrowd()
	r, conns := bigCrowd(t, n)
	r.SetLimits(Limits{PerIP: new(10)}, 0)
	each := float64(heap()-before) / float64(n)
	t.Logf("%.0f bytes for each record", each)
	if each > most {
		t.Errorf("got %.0f bytes for each record, want %d at most", each, most)
	}
	for _, c := range conns {
		finish(c, Idle)
	}
	// Go's maps keep their tables, some 50 bytes for each.
	if left := float64(heap()-before) / float64(n); left > most/4 {
		t.Errorf("got %.0f bytes left of each record, want nearly none", left)
	}
	runtime.KeepAlive(r)
}

// heap is the memory that is in use, in bytes.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what pools keep goes at the second
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
