// This file tests the end of connections that a filter selects.

package registry

import (
	"testing"
	"testing/synctest"
	"time"
)

// They end within the window, evenly; nobody else does, and a reload that keeps the
// route does not keep them.
func TestEndSelected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		a, b := r.Retain(WebSocket, "a"), r.Retain(WebSocket, "b")
		var selected, others []*session
		for range 50 {
			selected = append(selected, newSession(t, r, a))
			others = append(others, newSession(t, r, b))
		}
		const window = 10 * time.Second
		began := time.Now()
		if n := r.EndSelected(Filter{Route: "a"}, window, Ending{Reason: Admin, Code: 4000}); n != 50 {
			t.Fatalf("got %d selected, want 50", n)
		}
		time.Sleep(window / 2)
		if n := r.Len(); n < 70 || n > 80 {
			t.Errorf("got %d left at half-time, want 75 or so", n)
		}
		r.KeepAll(a, func(string) bool { return true }) // as a reload does
		time.Sleep(window)
		synctest.Wait()
		for _, s := range selected {
			if took := s.doneAt.Sub(began); took <= 0 || took > window {
				t.Errorf("got one ended after %s, want it in the window", took)
			}
			if ends := s.ended(); len(ends) != 1 || ends[0].Code != 4000 {
				t.Errorf("got ends %v, want one with the code", ends)
			}
		}
		for _, s := range others {
			if ends := s.ended(); len(ends) != 0 {
				t.Errorf("got another ended: %v", ends)
			}
		}
		if n := r.EndSelected(Filter{Kind: WebSocket}, 0, Ending{Reason: Admin}); n != 50 {
			t.Errorf("got %d selected, want 50", n)
		}
		time.Sleep(time.Second)
		if n := r.Len(); n != 0 {
			t.Errorf("got %d left, want none", n)
		}
	})
}

// Of two planned ends the sooner one holds.
func TestTheSoonerPlanHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		a := r.Retain(WebSocket, "a")
		s := newSession(t, r, a)
		r.EndSelected(Filter{Route: "a"}, time.Second, Ending{Reason: Admin})
		r.EndPaced(a, time.Minute, Ending{Reason: Orphan})
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if ends := s.ended(); len(ends) != 1 || ends[0].Reason != Admin {
			t.Errorf("got %v, want the sooner one", ends)
		}
	})
}

// What an admin has asked for holds, whatever else is planned: a reload that lifts that
// does not lift this.
func TestAnAdminsEndIsNotLiftedWithOthers(t *testing.T) {
	code := Ending{Reason: Admin, Code: 4000}
	for _, test := range []struct {
		name string
		plan func(r *Registry, a *Route)
	}{
		{"before another", func(r *Registry, a *Route) {
			r.EndSelected(Filter{Route: "a"}, time.Minute, code)
			r.EndPaced(a, time.Second, Ending{Reason: Orphan})
		}},
		{"after another", func(r *Registry, a *Route) {
			r.EndPaced(a, time.Second, Ending{Reason: Orphan})
			r.EndSelected(Filter{Route: "a"}, time.Minute, code)
		}},
		{"while another is lifted", func(r *Registry, a *Route) {
			r.EndPaced(a, time.Minute, Ending{Reason: Orphan})
			r.KeepAll(a, func(string) bool {
				r.EndSelected(Filter{Route: "a"}, time.Second, code)
				return true
			})
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := New()
				a := r.Retain(WebSocket, "a")
				o := new(owner)
				c := opened(t, r, a, o, "app:80")
				test.plan(r, a)
				r.KeepAll(a, func(string) bool { return true }) // as a reload does
				if at, e := c.PlannedEnd(); e != code || time.Until(at) != time.Second {
					t.Errorf("got %+v planned in %s, want %+v in %s", e, time.Until(at), code, time.Second)
				}
			})
		})
	}
}
