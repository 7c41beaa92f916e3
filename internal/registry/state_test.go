// This file tests the states of a connection and how it ends.

package registry

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

func TestEveryTransition(t *testing.T) {
	legal := map[State][]State{
		Connecting: {Open, Closing, Closed},
		Open:       {Held, Migrating, HalfOpen, Closing},
		Held:       {Open, Closing},
		Migrating:  {Open, Held, Closing},
		HalfOpen:   {Closing},
		Closing:    {Closed},
		Closed:     {},
	}
	if len(legal) != int(stateCount) {
		t.Fatalf("got %d states tested, want all %d", len(legal), stateCount)
	}
	for from := range stateCount {
		for to := range stateCount {
			t.Run(fmt.Sprintf("%v to %v", from, to), func(t *testing.T) {
				want := slices.Contains(legal[from], to)
				if got := from.mayBecome(to); got != want {
					t.Errorf("got mayBecome %t, want %t", got, want)
				}
				r := New()
				c := admit(t, r, r.Retain(WebSocket, "a"), new(owner))
				force(t, c, from)
				since, deadline := c.since, c.deadline
				var got bool
				switch to {
				case Connecting:
					return // nothing makes a record connect again
				case Open:
					if from == Connecting {
						open(c, new(owner), "")
						got = c.State() == Open
					} else {
						got = c.TakeOver(choose(c.route, "b"), "b:80", 0)
					}
				case Held:
					got = c.Hold() && from != Held
				case Migrating:
					got = c.Migrate()
				case HalfOpen:
					got = c.HalfClose()
				case Closing:
					got = c.Close(Ending{Reason: Lifetime})
				case Closed:
					c.Done()
					_, left := r.Get(c.ID())
					got = !left && from != Closed
				default:
					t.Fatalf("no way to %v", to)
				}
				if got != want {
					t.Errorf("got transition %t, want %t", got, want)
				}
				if !want && (c.State() != from || c.since != since || c.deadline != deadline) {
					t.Errorf("got state %v since %v after a refused transition, want it unchanged", c.State(), c.since)
				}
				if want && c.State() != to {
					t.Errorf("got state %v, want %v", c.State(), to)
				}
			})
		}
	}
}

func TestStateNames(t *testing.T) {
	seen := map[string]bool{}
	for s := range stateCount {
		got, err := ParseState(s.String())
		if err != nil || got != s || seen[s.String()] {
			t.Errorf("%v: got %v, error %v, want the state of that name alone", s, got, err)
		}
		seen[s.String()] = true
	}
	for _, name := range []string{"", "OPEN", "open ", "State(0)", "none"} {
		if got, err := ParseState(name); err == nil {
			t.Errorf("%q: got %v, want an error", name, got)
		}
	}
	if got := State(200).String(); got != "State(200)" {
		t.Errorf("got %q, want State(200)", got)
	}
}

// C11: the first trigger wins in each state, and the owner is told once.
func TestFirstReasonWins(t *testing.T) {
	reasons := []Reason{
		ClientClosed, ClientGone, BackendClosed, BackendLost, ClientProtocol, BackendBroke,
		Idle, NoData, Lifetime, PingTimeout, WriteTimeout, Orphan, Shutdown, Admin,
	}
	for _, first := range reasons {
		for _, second := range reasons {
			for _, isOpen := range []bool{false, true} {
				r := New()
				dialing, session := new(owner), new(owner)
				c := admit(t, r, r.Retain(WebSocket, "a"), dialing)
				told, idle := dialing, session
				if isOpen {
					open(c, session, "")
					told, idle = session, dialing
				}
				want := Ending{Reason: first, Code: 4001, Text: "first"}
				if !c.Close(want) {
					t.Fatalf("%s: got Close false, want true", first)
				}
				if c.Close(Ending{Reason: second, Code: 4002}) {
					t.Errorf("%s then %s: got a second winner", first, second)
				}
				if got := c.Ending().Reason; got != first || c.View().Reason != first {
					t.Errorf("%s then %s: got reason %s", first, second, got)
				}
				if got := told.ended(); len(got) != 1 || got[0] != want {
					t.Errorf("%s then %s: got owner told %v, want %v once", first, second, got, want)
				}
				if got := idle.ended(); len(got) != 0 {
					t.Errorf("%s then %s: got the wrong owner told %v", first, second, got)
				}
				c.Done()
				if c.Close(Ending{Reason: second}) || c.Ending().Reason != first {
					t.Errorf("%s: got reason %s after Done", first, c.Ending().Reason)
				}
			}
		}
	}
}

func TestConcurrentTriggersEndOnce(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	for range 200 {
		o := new(owner)
		c := opened(t, r, route, o, "app:80")
		var winner Reason
		var winners int
		var mu sync.Mutex
		var all sync.WaitGroup
		for _, reason := range []Reason{ClientGone, BackendLost, Idle, Admin, Shutdown} {
			all.Go(func() {
				if c.Close(Ending{Reason: reason}) {
					mu.Lock()
					winner = reason
					winners++
					mu.Unlock()
				}
			})
		}
		all.Wait()
		if got := o.ended(); winners != 1 || len(got) != 1 || got[0].Reason != winner || c.Ending().Reason != winner {
			t.Fatalf("got %d winners, owner told %v, reason %s, want one and the same", winners, got, c.Ending().Reason)
		}
		c.Done()
	}
	if r.Len() != 0 {
		t.Errorf("got %d connections left, want none", r.Len())
	}
}

// The end may come while a connection is about to open: then Open fails, and who
// dialed is told; or it comes before or after the session has taken over, which is
// told in either case, once.
func TestOpenAgainstClose(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	for range 500 {
		dialing, session := new(owner), new(owner)
		c := admit(t, r, route, dialing)
		var isOpen, closed bool
		var both sync.WaitGroup
		both.Go(func() {
			if isOpen = c.Open("chat"); isOpen {
				c.Handover(session)
			}
		})
		both.Go(func() { closed = c.Close(Ending{Reason: Admin, Code: 4001}) })
		both.Wait()
		d, s := dialing.ended(), session.ended()
		if !closed || len(d) > 1 || c.State() != Closing {
			t.Fatalf("got closed %t, state %v, dialing told %v", closed, c.State(), d)
		}
		if isOpen && (len(s) != 1 || s[0].Code != 4001) || !isOpen && (len(s) != 0 || len(d) != 1) {
			t.Fatalf("got opened %t, session told %v, dialing %v", isOpen, s, d)
		}
		c.Done()
	}
}

func TestDoneRemovesTheRecord(t *testing.T) {
	r := New()
	c := opened(t, r, r.Retain(WebSocket, "a"), new(owner), "app:80")
	c.Close(Ending{Reason: Idle})
	if got, ok := r.Get(c.ID()); !ok || got != c {
		t.Error("got a closing connection out of the index, want it there until Done")
	}
	c.Done()
	if _, ok := r.Get(c.ID()); ok || r.Len() != 0 || c.State() != Closed {
		t.Errorf("got state %v and %d connections after Done, want none", c.State(), r.Len())
	}
	c.Done() // C11: cleanup runs once
	if r.Len() != 0 || r.Stats().ClosedByReason[Idle] != 1 {
		t.Errorf("got %d connections, %v closed after a second Done, want one closed", r.Len(), r.Stats().ClosedByReason)
	}
}

func TestOwnersAreCalledWithoutLocks(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	var c *Conn
	o := &owner{whenEnd: func(Ending) {
		_ = c.State()
		_ = r.Stats()
		c.CloseAt(time.Time{}, Ending{})
		c.Done()
	}}
	c = opened(t, r, route, o, "app:80")
	c.Close(Ending{Reason: Admin}) // would not return under a lock
	if r.Len() != 0 {
		t.Errorf("got %d connections, want none", r.Len())
	}
}

func TestClosingHasADeadline(t *testing.T) {
	r := New()
	c := opened(t, r, r.Retain(WebSocket, "a"), new(owner), "app:80")
	before := time.Now()
	c.Close(Ending{Reason: Idle})
	if late := c.deadline.Sub(before); late < ClosingTimeout || late > ClosingTimeout+time.Second {
		t.Errorf("got a deadline in %v, want in %v", late, ClosingTimeout)
	}
}

// C30: whatever comes in whatever order, a connection ends in Closed, gauges and
// counts are right at every step, and nothing is left.
func TestRandomEventOrders(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 30))
		r := New()
		route := r.Retain(WebSocket, "a")
		c := admit(t, r, route, new(owner))
		want := Connecting
		for range 12 {
			switch event := rng.IntN(4); {
			case event == 0:
				open(c, new(owner), "")
				if want == Connecting {
					want = Open
				}
			case event == 1:
				c.Close(Ending{Reason: Idle})
				if want != Closed {
					want = Closing
				}
			case event == 2 && want != Closed:
				c.Attempt(choose(route, "app:80"), "app:80", time.Time{})
			case event == 3 && want != Open: // an owner closes before it is done
				c.Done()
				want = Closed
			}
			if got := c.State(); got != want {
				t.Fatalf("seed %d: got state %v, want %v", seed, got, want)
			}
		}
		finish(c, Admin)
		if n := placed(route, "app:80"); c.State() != Closed || r.Len() != 0 || n != 0 || len(route.upstreams) != 0 {
			t.Fatalf("seed %d: got state %v, %d connections, %d places, want nothing left", seed, c.State(), r.Len(), n)
		}
	}
}
