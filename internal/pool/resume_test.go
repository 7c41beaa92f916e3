// This file tests the way through the pool of connections that have lost an
// upstream, or leave it.

package pool

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
)

func TestTheLostUpstreamComesLast(t *testing.T) {
	tests := map[string]struct {
		last string
		do   func(r *rig)
		want []string
	}{
		"the first of the pool":     {"a:80", nil, []string{"b:80", "c:80", "a:80"}},
		"the last of the pool":      {"c:80", nil, []string{"a:80", "b:80", "c:80"}},
		"one that is gone":          {"z:80", nil, []string{"a:80", "b:80", "c:80"}},
		"it counts as failed":       {"a:80", func(r *rig) { r.fail("a:80", 1) }, []string{"b:80", "c:80", "a:80"}},
		"another one has failed":    {"a:80", func(r *rig) { r.fail("b:80", 1) }, []string{"c:80", "a:80", "b:80"}},
		"it and another have":       {"a:80", func(r *rig) { r.fail("a:80", 1); r.fail("b:80", 1) }, []string{"c:80", "b:80", "a:80"}},
		"all have failed":           {"b:80", func(r *rig) { r.fail("a:80", 1); r.fail("b:80", 1); r.fail("c:80", 1) }, []string{"a:80", "c:80", "b:80"}},
		"it is drained":             {"a:80", func(r *rig) { r.drain("a:80", true) }, []string{"b:80", "c:80"}},
		"others are drained":        {"a:80", func(r *rig) { r.drain("b:80", true); r.drain("c:80", true) }, []string{"a:80"}},
		"another one is full":       {"b:80", func(r *rig) { r.connect() }, []string{"c:80", "b:80"}},
		"all are drained or full":   {"b:80", func(r *rig) { r.connect(); r.drain("b:80", true); r.drain("c:80", true) }, nil},
		"failed, and drained, too":  {"b:80", func(r *rig) { r.fail("a:80", 1); r.drain("a:80", true) }, []string{"c:80", "b:80"}},
		"failed, and full, too":     {"b:80", func(r *rig) { r.connect(); r.fail("a:80", 1) }, []string{"c:80", "b:80"}},
		"the only one that is left": {"a:80", func(r *rig) { r.fail("a:80", 1); r.drain("b:80", true); r.drain("c:80", true) }, []string{"a:80"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, abc, full(1), fails(1, time.Hour))
			if test.do != nil {
				test.do(r)
			}
			r.want(r.resume(test.last), test.want...)
		})
	}
}

// A held client has pauses of its own, so it tries once around and waits for nothing.
func TestAHeldClientTriesOnceAround(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc, retries(0), waits(time.Hour))
		elapsed(t, 0, func() {
			r.want(r.resume("a:80"), "b:80", "c:80", "a:80")
			r.want(r.move("a:80"), "b:80", "c:80")
		})
		for _, name := range abc {
			r.drain(name, true)
		}
		elapsed(t, 0, func() {
			r.want(r.resume("a:80"))
			r.want(r.move("a:80"))
		})
	})
}

// What active checks say against an upstream holds for held clients, too; but they
// do not wait until it is checked again in due course.
func TestProbesKeepHeldClientsAwayAndAreHurried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc[:1], checked(health.NewCheckers()))
		r.net.set("a:80", true)
		pass(time.Minute)
		r.want(r.resume("a:80"))
		synctest.Wait()
		r.net.set("a:80", false)
		r.net.dialed()
		r.want(r.resume("a:80")) // still, and again has it probed
		pass(time.Second)
		if n := len(r.net.dialed()); n != 1 {
			t.Errorf("got %d probes within a second, want 1", n)
		}
		r.want(r.resume("a:80"), "a:80")
		pass(30 * time.Second)
		if n := len(r.net.dialed()); n != 0 {
			t.Errorf("got %d probes of a healthy upstream before they are due, want none", n)
		}
	})
}

// A client that waits for an upstream has it probed as well, and gets it then.
func TestProbesAreHurriedForNewClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc[:1], checked(health.NewCheckers()), waits(10*time.Second))
		r.net.set("a:80", true)
		pass(time.Minute)
		time.AfterFunc(1500*time.Millisecond, func() { r.net.set("a:80", false) })
		began := time.Now()
		target := r.open().Next(t.Context())
		if took := time.Since(began); target == nil || took < 1500*time.Millisecond || took > 4*time.Second {
			t.Errorf("got %v after %v, want a:80 soon after 1.5s", target, took)
		}
	})
}

func TestAMoveNeverReturnsTheLeftOne(t *testing.T) {
	tests := map[string]struct {
		do   func(r *rig)
		want []string
	}{
		"others":                    {nil, []string{"a:80", "c:80"}},
		"another one has failed":    {func(r *rig) { r.fail("a:80", 1) }, []string{"c:80"}},
		"another one is drained":    {func(r *rig) { r.drain("a:80", true) }, []string{"c:80"}},
		"another one is full":       {func(r *rig) { r.connect() }, []string{"c:80"}},
		"it is drained":             {func(r *rig) { r.drain("b:80", true) }, []string{"a:80", "c:80"}},
		"all others have failed":    {func(r *rig) { r.fail("a:80", 1); r.fail("c:80", 1) }, nil},
		"all others are unsuitable": {func(r *rig) { r.connect(); r.drain("c:80", true) }, nil},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, abc, full(1), fails(1, time.Hour))
			if test.do != nil {
				test.do(r)
			}
			if got, want := r.pool.Others(r.route, "b:80"), len(test.want) > 0; got != want {
				t.Errorf("Others: got %t, want %t", got, want)
			}
			r.want(r.move("b:80"), test.want...)
		})
	}
}

// An upstream whose address placeholders made is told from others by that address.
func TestTheLostAddressComesLast(t *testing.T) {
	r := newRig(t, []string{"{tenant}:80", "b:80"})
	c := client()
	c.Addresses = map[string]Address{"{tenant}:80": mustParse(t, "one:80")}
	for why, want := range map[Why][]string{
		Opening:  {"{tenant}:80 one:80", "b:80"},
		Resuming: {"b:80", "{tenant}:80 one:80"},
		Moving:   {"b:80"},
	} {
		r.want(r.pool.Tries(r.route, c, why, "{tenant}:80 one:80"), want...)
	}
	if !r.pool.Has("{tenant}:80 one:80") || r.pool.Leaves(r.route, "{tenant}:80 one:80") {
		t.Error("got the address taken for one that is gone")
	}
	if !r.pool.Others(r.route, "{tenant}:80 one:80") {
		t.Error("got no others, want b:80")
	}
}

func mustParse(t *testing.T, name string) Address {
	t.Helper()
	a, err := ParseAddress(name)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
