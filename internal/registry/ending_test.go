// This file tests how many connections are ended together: paced when their
// route is gone, at once when the server stops.

package registry

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// session is an owner that does as a session does: it ends when its planned end
// is due, and is done some time after its end has begun.
type session struct {
	owner
	c        *Conn
	stubborn bool // ends only when it is cut
	takes    time.Duration
	doneAt   time.Time
	wake     chan struct{}
}

func newSession(t *testing.T, r *Registry, route *Route) *session {
	t.Helper()
	s := &session{wake: make(chan struct{}, 1)}
	s.c = opened(t, r, route, s, "app:80")
	return s
}

func (s *session) End(e Ending) {
	s.owner.End(e)
	if !s.stubborn {
		time.AfterFunc(s.takes, s.done)
	}
}

func (s *session) Abort() {
	s.owner.Abort()
	if s.stubborn {
		time.AfterFunc(s.takes, s.done)
	}
}

func (s *session) Move() error { return nil }

func (s *session) done() {
	s.doneAt = time.Now()
	s.c.Done()
}

func (s *session) Reconsider() {
	s.owner.Reconsider()
	if at, e := s.c.PlannedEnd(); !at.IsZero() {
		time.AfterFunc(time.Until(at), func() {
			if now, _ := s.c.PlannedEnd(); now.Equal(at) {
				s.c.Close(e)
			}
		})
	}
}

func TestEndPacedSpreadsEvenly(t *testing.T) {
	for _, test := range []struct {
		name   string
		count  int
		window time.Duration
	}{
		{"none", 0, time.Second},
		{"one", 1, 10 * time.Second},
		{"some", 10, 10 * time.Second},
		{"many", 1000, 10 * time.Second},
		{"more than nanoseconds", 100, 50},
		{"at once", 50, 0},
		{"over a day", 1200, 24 * time.Hour},
		// 292 years are the longest duration there is: 100 days of 1200 connections are more.
		{"over months", 1200, 100 * 24 * time.Hour},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := New()
				route, other := r.Retain(WebSocket, "a"), r.Retain(WebSocket, "b")
				stays := newSession(t, r, other)
				var all []*session
				for range test.count {
					all = append(all, newSession(t, r, route))
				}
				began := time.Now()
				e := Ending{Reason: Orphan, Code: 4000}
				if n := r.EndPaced(route, test.window, e); n != test.count {
					t.Errorf("got %d, want %d", n, test.count)
				}
				var due []time.Duration
				for _, s := range all {
					at, planned := s.c.PlannedEnd()
					if planned != e {
						t.Fatalf("got %v planned, want %v", planned, e)
					}
					due = append(due, at.Sub(began))
				}
				inOrder := slices.IsSorted(due)
				slices.Sort(due)
				for i, d := range due {
					want := time.Duration(float64(test.window) * float64(i+1) / float64(test.count))
					if diff := d - want; diff < -time.Millisecond || diff > time.Millisecond {
						t.Fatalf("got connection %d of %d due in %v, want in %v", i+1, test.count, d, want)
					}
				}
				if test.count > 0 && due[test.count-1] != test.window {
					t.Errorf("got the last one due in %v, want in %v", due[test.count-1], test.window)
				}
				if test.count >= 10 && test.window > time.Second && inOrder {
					t.Error("got the oldest ended first, want a random order")
				}
				time.Sleep(test.window + time.Millisecond)
				synctest.Wait()
				if n := r.Len(); n != 1 || stays.c.State() != Open {
					t.Errorf("got %d connections left, want only the other route's", n)
				}
				finish(stays.c, Admin)
			})
		})
	}
}

func TestKeepAllLiftsWhatIsPlanned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		route, other := r.Retain(WebSocket, "a"), r.Retain(WebSocket, "b")
		var all []*session
		for range 10 {
			all = append(all, newSession(t, r, route))
		}
		elsewhere := newSession(t, r, other)
		r.EndPaced(route, 10*time.Second, Ending{Reason: Orphan})
		r.EndPaced(other, 10*time.Second, Ending{Reason: Orphan})
		time.Sleep(5*time.Second + time.Millisecond)
		synctest.Wait()
		r.KeepAll(route, func(string) bool { return true })
		time.Sleep(time.Hour)
		synctest.Wait()
		kept := 0
		for _, s := range all {
			if s.c.State() == Open {
				kept++
				if at, _ := s.c.PlannedEnd(); !at.IsZero() {
					t.Error("got an end planned after KeepAll, want none")
				}
				_, _, before := s.counts()
				r.KeepAll(route, func(string) bool { return true })
				if _, _, after := s.counts(); after != before {
					t.Error("got a session told of a change when nothing was planned")
				}
				finish(s.c, Admin)
			}
		}
		if kept != 5 {
			t.Errorf("got %d kept half way through, want 5", kept)
		}
		if elsewhere.c.State() != Closed {
			t.Error("got a connection of another route kept")
		}
	})
}

// Connections of upstreams that are to be left end, for the reason given; a plan is not put
// off, nor lifted unless the upstream has recovered or, by KeepAll, has come back.
func TestEndLeaving(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		route := r.Retain(Passthrough, "a")
		gone, sick, fine := newSession(t, r, route), newSession(t, r, route), newSession(t, r, route)
		sick.c.Attempt(choose(route, "sick:80"), "sick:80", time.Time{})
		fine.c.Attempt(choose(route, "fine:80"), "fine:80", time.Time{})
		leaves := func(upstream string) Reason {
			return map[string]Reason{"app:80": Orphan, "sick:80": Unhealthy}[upstream]
		}
		if n := r.EndLeaving(route, leaves, time.Minute); n != 2 {
			t.Errorf("got %d to end, want 2", n)
		}
		due, why := gone.c.PlannedEnd()
		_, sickWhy := sick.c.PlannedEnd()
		if at, _ := fine.c.PlannedEnd(); why.Reason != Orphan || sickWhy.Reason != Unhealthy || !at.IsZero() {
			t.Errorf("got ends planned for %q, %q and at %v; want orphan, unhealthy and none", why.Reason, sickWhy.Reason, at)
		}
		time.Sleep(time.Second)
		if n := r.EndLeaving(route, leaves, time.Hour); n != 0 {
			t.Errorf("got %d more to end, want none", n)
		}
		r.KeepAll(route, func(upstream string) bool { return leaves(upstream) == "" })
		if at, _ := gone.c.PlannedEnd(); at != due {
			t.Errorf("got the end put off to %v, want it at %v", at, due)
		}
		r.EndLeaving(route, func(string) Reason { return "" }, time.Minute)
		at, _ := gone.c.PlannedEnd()
		if again, _ := sick.c.PlannedEnd(); at != due || !again.IsZero() {
			t.Errorf("got ends at %v and %v, want %v and none: that one has recovered", at, again, due)
		}
		r.KeepAll(route, func(string) bool { return true })
		time.Sleep(time.Hour)
		synctest.Wait()
		for _, s := range []*session{gone, sick, fine} {
			if s.c.State() != Open {
				t.Errorf("got %v, want all open", s.c.State())
			}
			finish(s.c, Admin)
		}
	})
}

// What is planned for a connection because of its upstream is over when it attempts another
// one; other plans are not.
func TestEndLeavingWhileConnecting(t *testing.T) {
	for name, tt := range map[string]struct {
		next string
		plan func(r *Registry, route *Route)
		want Reason // of the end that is planned then
	}{
		"another upstream":  {"fine:80", func(*Registry, *Route) {}, ""},
		"the same upstream": {"app:80", func(*Registry, *Route) {}, Orphan},
		"the route as well": {"fine:80", func(r *Registry, route *Route) {
			r.EndPaced(route, time.Hour, Ending{Reason: Orphan})
		}, Orphan},
		"told to end": {"fine:80", func(r *Registry, route *Route) {
			r.EndSelected(Filter{Route: "a"}, time.Second, Ending{Reason: Admin})
		}, Admin},
	} {
		t.Run(name, func(t *testing.T) {
			r := New()
			route := r.Retain(Passthrough, "a")
			c, err := r.Admit(route, Info{Kind: Passthrough}, new(owner))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Done()
			c.Attempt(choose(route, "app:80"), "app:80", time.Time{})
			if n := r.EndLeaving(route, func(string) Reason { return Orphan }, time.Minute); n != 1 {
				t.Fatalf("got %d to end, want 1", n)
			}
			tt.plan(r, route)
			c.Attempt(choose(route, tt.next), tt.next, time.Time{})
			if at, e := c.PlannedEnd(); e.Reason != tt.want || at.IsZero() != (tt.want == "") {
				t.Errorf("got an end planned at %v for %q, want it for %q", at, e.Reason, tt.want)
			}
		})
	}
}

func TestReconsiderAll(t *testing.T) {
	r := New()
	a, b := r.Retain(WebSocket, "a"), r.Retain(WebSocket, "b")
	mine, others := new(owner), new(owner)
	opened(t, r, a, mine, "app:80")
	opened(t, r, a, mine, "app:80")
	opened(t, r, b, others, "app:80")
	r.ReconsiderAll(a)
	_, _, n := mine.counts()
	_, _, m := others.counts()
	if n != 2 || m != 0 {
		t.Errorf("got %d and %d told, want 2 of the route and 0 of the other", n, m)
	}
}

func TestShutdownReturnsWhenEmpty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		route := r.Retain(WebSocket, "a")
		var all []*session
		for i := range 20 {
			s := newSession(t, r, route)
			s.takes = time.Duration(i) * 100 * time.Millisecond
			all = append(all, s)
		}
		dialing := new(owner)
		c := admit(t, r, route, dialing)
		dialing.whenEnd = func(Ending) { time.AfterFunc(time.Second, c.Done) }
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		began := time.Now()
		if cut := r.Shutdown(ctx); cut != 0 {
			t.Errorf("got %d cut, want none", cut)
		}
		if took := time.Since(began); took != 1900*time.Millisecond {
			t.Errorf("got Shutdown back after %v, want as soon as the last one has ended", took)
		}
		for _, s := range all {
			if got := s.ended(); len(got) != 1 || got[0].Reason != Shutdown {
				t.Errorf("got a session told %v, want shutdown once", got)
			}
			if _, aborts, _ := s.counts(); aborts != 0 {
				t.Error("got a session cut that ended in time")
			}
		}
		if got := dialing.ended(); len(got) != 1 || r.Len() != 0 {
			t.Errorf("got a dialing connection told %v, %d left", got, r.Len())
		}
	})
}

func TestShutdownCutsWhatIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		route := r.Retain(WebSocket, "a")
		quick, stuck := newSession(t, r, route), newSession(t, r, route)
		stuck.stubborn, stuck.takes = true, time.Minute
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		began := time.Now()
		if cut := r.Shutdown(ctx); cut != 1 {
			t.Errorf("got %d cut, want the one that does not end", cut)
		}
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("got Shutdown back after %v, want at the end of its context", took)
		}
		if _, aborts, _ := quick.counts(); aborts != 0 {
			t.Error("got a session cut that ended in time")
		}
		if _, aborts, _ := stuck.counts(); aborts != 1 {
			t.Errorf("got the stuck session cut %d times, want once", aborts)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if r.Len() != 0 {
			t.Errorf("got %d connections left, want none", r.Len())
		}
	})
}

func TestShutdownTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		s := newSession(t, r, r.Retain(WebSocket, "a"))
		s.takes = time.Second
		second := make(chan int, 1)
		go func() { second <- r.Shutdown(t.Context()) }() // until the session is done
		if cut := r.Shutdown(t.Context()); cut != 0 || <-second != 0 {
			t.Error("got sessions cut, want none")
		}
		if got := s.ended(); len(got) != 1 {
			t.Errorf("got the session told %v, want once", got)
		}
		if cut := r.Shutdown(t.Context()); cut != 0 {
			t.Error("got sessions cut of none")
		}
	})
}
