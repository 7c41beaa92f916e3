// This file tests listings: order, pages under churn, filters, totals.

package registry

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func ids(page []View) []string {
	out := []string{}
	for _, v := range page {
		out = append(out, v.ID)
	}
	return out
}

func TestListIsInOrderOfAge(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	var want []string
	for range 500 {
		want = append(want, admit(t, r, route, new(owner)).ID())
	}
	if !slices.IsSorted(want) {
		t.Fatal("got ids that do not grow with age")
	}
	for _, limit := range []int{1, 7, 100, 499, 500, 501} {
		var got []string
		after, pages := "", 0
		for {
			page, next := r.List(Filter{}, limit, after)
			got, pages = append(got, ids(page)...), pages+1
			if len(page) > limit || next != "" && len(page) < limit {
				t.Fatalf("limit %d: got a page of %d with next %q", limit, len(page), next)
			}
			if after = next; after == "" {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("limit %d: got %d ids in another order, want all 500 by age", limit, len(got))
		}
		if wantPages := (499 + limit) / limit; pages != wantPages {
			t.Errorf("limit %d: got %d pages, want %d", limit, pages, wantPages)
		}
	}
}

func TestListOfNothing(t *testing.T) {
	r := New()
	page, next := r.List(Filter{}, 100, "")
	if page == nil || len(page) != 0 || next != "" {
		t.Errorf("got %v, next %q, want an empty page that is not null", page, next)
	}
	admit(t, r, r.Retain(WebSocket, "a"), new(owner))
	if page, next = r.List(Filter{}, 100, "~ after all ids"); page == nil || len(page) != 0 || next != "" {
		t.Errorf("got %v, next %q after the last id, want an empty page that is not null", page, next)
	}
}

// While a listing goes on, connections come and go, among them those at its
// cursor, and empty slots are compacted away.
func TestPagesUnderChurn(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 2))
		r := New()
		route := r.Retain(WebSocket, "a")
		live := map[string]*Conn{}
		for range 400 {
			c := admit(t, r, route, new(owner))
			live[c.ID()] = c
		}
		through := map[string]bool{} // alive when it began, and still
		for id := range live {
			through[id] = true
		}
		end := func(id string) {
			finish(live[id], Idle)
			delete(live, id)
			delete(through, id)
		}
		seen := map[string]int{}
		after, last := "", ""
		for {
			page, next := r.List(Filter{}, 1+rng.IntN(40), after)
			for _, v := range page {
				if seen[v.ID]++; v.ID <= last {
					t.Fatalf("seed %d: got %s after %s, want order of age", seed, v.ID, last)
				}
				last = v.ID
				if live[v.ID] == nil {
					t.Fatalf("seed %d: got %s, which is gone", seed, v.ID)
				}
			}
			if after = next; after == "" {
				break
			}
			if live[after] != nil && rng.IntN(2) == 0 {
				end(after) // the cursor's own connection
			}
			for id := range live {
				if rng.IntN(4) == 0 {
					end(id)
				}
			}
			for range rng.IntN(10) {
				c := admit(t, r, route, new(owner))
				live[c.ID()] = c
			}
		}
		for id := range through {
			if seen[id] != 1 {
				t.Fatalf("seed %d: got a connection that lived through it %d times, want once", seed, seen[id])
			}
		}
		for id, n := range seen {
			if n != 1 {
				t.Fatalf("seed %d: got %s %d times, want once", seed, id, n)
			}
		}
		if len(r.byAge.slots) > 2*len(live)+65 {
			t.Errorf("seed %d: got %d slots for %d connections", seed, len(r.byAge.slots), len(live))
		}
	}
}

func TestFilters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		a, b := r.Retain(WebSocket, "a"), r.Retain(WebSocket, "b")
		info := func(client string) Info { return Info{Kind: WebSocket, Client: client} }
		old, _ := r.Admit(a, info("10.0.0.1"), new(owner))
		old.Attempt(choose(a, "app:80"), "10.1.1.1:80", time.Time{})
		open(old, new(owner), "")
		time.Sleep(time.Minute)
		closing, _ := r.Admit(b, info("10.0.0.1"), new(owner))
		closing.Attempt(choose(b, "app:80"), "10.1.1.1:80", time.Time{})
		open(closing, new(owner), "")
		closing.Close(Ending{Reason: Idle})
		time.Sleep(time.Minute)
		dialing, _ := r.Admit(a, info("10.0.0.2"), new(owner))

		all := []*Conn{old, closing, dialing}
		state := func(s State) *State { return &s }
		for _, test := range []struct {
			name   string
			filter Filter
			want   []*Conn
		}{
			{"all", Filter{}, all},
			{"kind", Filter{Kind: WebSocket}, all},
			{"other kind", Filter{Kind: "other"}, nil},
			{"route", Filter{Route: "a"}, []*Conn{old, dialing}},
			{"unknown route", Filter{Route: "A"}, nil},
			{"upstream", Filter{Upstream: "app:80"}, []*Conn{old, closing}},
			{"upstream by what was dialed", Filter{Upstream: "10.1.1.1:80"}, nil},
			{"connecting", Filter{State: state(Connecting)}, []*Conn{dialing}},
			{"open", Filter{State: state(Open)}, []*Conn{old}},
			{"closing", Filter{State: state(Closing)}, []*Conn{closing}},
			{"closed", Filter{State: state(Closed)}, nil},
			{"client", Filter{Client: "10.0.0.1"}, []*Conn{old, closing}},
			{"part of a client", Filter{Client: "10.0.0"}, nil},
			{"age", Filter{MinAge: time.Minute}, []*Conn{old, closing}},
			{"age, exactly", Filter{MinAge: 2 * time.Minute}, []*Conn{old}},
			{"age of none", Filter{MinAge: 2*time.Minute + 1}, nil},
			{"several", Filter{Route: "a", Client: "10.0.0.1", Upstream: "app:80", State: state(Open), MinAge: time.Second, Kind: WebSocket}, []*Conn{old}},
			{"several that exclude each other", Filter{Route: "b", Client: "10.0.0.2"}, nil},
		} {
			want := []string{}
			for _, c := range test.want {
				want = append(want, c.ID())
			}
			page, next := r.List(test.filter, 100, "")
			if got := ids(page); !slices.Equal(got, want) || next != "" {
				t.Errorf("%s: got %v, next %q, want %v", test.name, got, next, want)
			}
		}
		// Where the page is full and nothing else matches there is no next one.
		if page, next := r.List(Filter{Route: "b"}, 1, ""); len(page) != 1 || next != "" {
			t.Errorf("got %d connections, next %q, want one and no next page", len(page), next)
		}
	})
}

func TestView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		route := r.Retain(WebSocket, "a")
		c, _ := r.Admit(route, Info{
			Kind: WebSocket, Client: "10.0.0.1", Host: "example.com", URI: "/chat?x", SNI: "example.com", Protocol: "h1",
		}, new(owner))
		admitted := time.Now()
		time.Sleep(2 * time.Second)
		want := View{
			ID: c.ID(), Kind: WebSocket, Route: "a", State: "connecting", Client: "10.0.0.1", Host: "example.com", URI: "/chat?x",
			SNI: "example.com", Protocol: "h1", OpenedAt: admitted, Age: 2, Idle: 2,
		}
		if got := c.View(); got != want {
			t.Errorf("connecting: got %+v, want %+v", got, want)
		}
		c.Attempt(choose(route, "app:80"), "10.1.1.1:80", time.Now().Add(time.Second))
		time.Sleep(time.Second)
		open(c, new(owner), "chat")
		want.State, want.Upstream, want.Dial, want.Subprotocol = "open", "app:80", "10.1.1.1:80", "chat"
		want.OpenedAt, want.Age, want.Idle = time.Now(), 0, 0
		if got := c.View(); got != want {
			t.Errorf("open: got %+v, want %+v", got, want)
		}
		if at, some := c.LastData(); some || at != 3*time.Second {
			t.Errorf("got data %t at %v, want none since 3s", some, at)
		}
		time.Sleep(1500 * time.Millisecond)
		c.Count(In, 100, 1)
		c.Count(In, 50, 0)
		c.Count(Out, 7, 2)
		time.Sleep(250 * time.Millisecond)
		want.Age, want.Idle = 1.75, 0.25
		want.BytesIn, want.MessagesIn, want.BytesOut, want.MessagesOut = 150, 1, 7, 2
		if got := c.View(); got != want {
			t.Errorf("after data: got %+v, want %+v", got, want)
		}
		if at, some := c.LastData(); !some || at != 4500*time.Millisecond {
			t.Errorf("got data %t at %v, want some at 4.5s", some, at)
		}
		c.Close(Ending{Reason: Lifetime})
		want.State, want.Reason = "closing", Lifetime
		if got := c.View(); got != want {
			t.Errorf("closing: got %+v, want %+v", got, want)
		}
	})
}

// An empty message is data.
func TestEmptyMessagesCount(t *testing.T) {
	r := New()
	c := opened(t, r, r.Retain(WebSocket, "a"), new(owner), "app:80")
	c.Count(Out, 0, 1)
	if _, some := c.LastData(); !some {
		t.Error("got no data after an empty message, want some")
	}
}

func TestViewAsJSON(t *testing.T) {
	r := New()
	c := opened(t, r, r.Retain(WebSocket, "a"), new(owner), "app:80")
	b, err := json.Marshal(c.View())
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	for name := range strings.FieldsSeq("id kind route state client upstream dial host uri protocol opened_at age idle " +
		"bytes_in bytes_out messages_in messages_out") {
		if _, ok := got[name]; !ok {
			t.Errorf("got no %q in %s", name, b)
		}
	}
	if _, err := time.Parse(time.RFC3339, fmt.Sprint(got["opened_at"])); err != nil {
		t.Errorf("opened_at: %v", err)
	}
	if _, ok := got["age"].(float64); !ok {
		t.Errorf("got age %v, want a number", got["age"])
	}
}

func TestStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		empty, err := json.Marshal(New().Stats())
		if err != nil || strings.Contains(string(empty), "null") {
			t.Errorf("got %s, error %v, want no null in it", empty, err)
		}
		a, b := r.Retain(WebSocket, "a"), r.Retain(WebSocket, "b")
		opened(t, r, a, new(owner), "app:80")
		time.Sleep(time.Minute)
		opened(t, r, b, new(owner), "app:80").Close(Ending{Reason: Idle})
		finish(opened(t, r, b, new(owner), "app:81"), Admin)
		finish(opened(t, r, b, new(owner), "app:81"), Admin)
		admit(t, r, a, new(owner)).Done() // was never open: not closed either
		admit(t, r, a, new(owner))
		time.Sleep(500 * time.Millisecond)

		got := r.Stats()
		want := Stats{
			Total: 3, ByKind: map[Kind]int{WebSocket: 3}, ByRoute: map[string]int{"a": 2, "b": 1},
			ByUpstream: map[string]int{"app:80": 2}, ByState: map[string]int{"open": 1, "closing": 1, "connecting": 1},
			ClosedByReason: map[Reason]uint64{Admin: 2},
			AgeSeconds: Ages{LE: map[string]int{
				"1": 2, "10": 2, "60": 2, "300": 3, "1800": 3, "3600": 3, "14400": 3, "86400": 3, "604800": 3, "+Inf": 3,
			}},
		}
		if g, w := fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", want); g != w {
			t.Errorf("got  %s\nwant %s", g, w)
		}
	})
}
