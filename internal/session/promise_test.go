// This file compares what arrived, on either side and over all backends, with
// what was sent and what the route's replay promises.

package session

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

var modes = []replay.Mode{replay.Unacked, replay.Unsent, replay.Strict, replay.Off}

// resuming are the settings of a route that holds clients.
func resuming(mode replay.Mode) Settings {
	s := defaults
	s.Replay, s.ReplayBuffer = mode, 5<<20
	s.ResumeTimeout, s.ResumeMin, s.ResumeMax = 30*time.Second, 100*time.Millisecond, 5*time.Second
	s.ResumeOn, s.ResumeLimit = []uint16{1001, 1012, 1013}, 3
	s.DrainWindow = 10 * time.Second
	return s
}

// wholeMessages decodes the complete messages of a byte stream, and what there
// is of one more.
func wholeMessages(wire []byte) (all []string, part string) {
	for {
		head, size, ok := parseHeader(wire)
		if !ok {
			return all, part
		}
		end := size + int(head.Length)
		payload := slices.Clone(wire[size:min(end, len(wire))])
		if head.Masked {
			ws.Cipher(payload, head.Mask, 0)
		}
		if !head.OpCode.IsControl() {
			part += string(payload)
		}
		if end > len(wire) {
			return all, part
		}
		wire = wire[end:]
		if !head.OpCode.IsControl() && head.Fin {
			all, part = append(all, part), ""
		}
	}
}

// written are the messages of which the session got each byte to a backend's kernel.
func (p *peer) written() []string {
	p.conn.in.mu.Lock()
	defer p.conn.in.mu.Unlock()
	all, _ := wholeMessages(*p.conn.in.log)
	return all
}

// promise is what a client has sent: messages that are all different, in order.
type promise struct {
	mode replay.Mode
	sent []string
}

// wantKept checks what the backends got of a client's messages. While the session
// lives, or when the client's close frame came through, all that was sent must
// have arrived.
func (r *rig) wantKept(want promise) {
	r.t.Helper()
	index := make(map[string]int, len(want.sent))
	for i, m := range want.sent {
		index[m] = i
	}
	// Without pongs, what a kernel has acknowledged counts as read.
	got := map[string]bool{}
	r.mu.Lock()
	pongless := r.Settings().PingInterval == 0 || len(r.warned) > 0
	r.mu.Unlock()
	may := func(from, to int) bool { // [from, to) may be missing
		return pongless && !slices.ContainsFunc(want.sent[from:to], func(m string) bool { return !got[m] })
	}
	next, wrote := 0, 0 // one after the last message that was read, written so far
	used := r.used()
	for i, p := range used {
		wantLegal(r.t, "to a backend", p)
		read, _ := p.messages()
		written := p.written()
		if want.mode == replay.Unacked {
			next = r.wantRun(want, index, i, p, read, next, may)
			for _, m := range written {
				got[m] = true
			}
			continue
		}
		wrote = r.wantOnce(want, index, i, written, wrote)
		if want.mode == replay.Strict && len(read) < len(written) && i < len(used)-1 && !pongless {
			r.t.Errorf("strict: backend %d got %d messages of %d written, and there is another backend, want the client told",
				i, len(read), len(written))
		}
		if p.told.Replayed != 0 {
			r.t.Errorf("%v: backend %d was told of %d repeats, want none", want.mode, i, p.told.Replayed)
		}
	}
	delivered := r.rec.Ending().Reason == registry.ClientClosed && r.heardClose(used[len(used)-1])
	if !r.live() && !delivered {
		return
	}
	if want.mode != replay.Unacked {
		next = wrote
	}
	if next != len(want.sent) && want.mode != replay.Off && !may(next, len(want.sent)) {
		r.t.Errorf("%v: got %d messages delivered, want all %d while the session lives", want.mode, next, len(want.sent))
	}
}

// heardClose reports whether a backend got the client's close frame, and with it
// all that the client sent before.
func (r *rig) heardClose(p *peer) bool {
	frames := p.received()
	return len(frames) > 0 && frames[len(frames)-1].head.OpCode == ws.OpClose
}

// wantRun checks under unacked that a backend goes on where the ones before it
// ended, or before that, and by no more than it was told.
func (r *rig) wantRun(want promise, index map[string]int, i int, p *peer, read []string, next int, may func(from, to int) bool) int {
	r.t.Helper()
	repeats, last := 0, -1
	for k, m := range read {
		at, known := index[m]
		switch {
		case !known:
			r.t.Errorf("backend %d got message %d as %.40q, which was never sent", i, k, m)
			return next
		case last >= 0 && at != last+1 && !may(last+1, max(at, last+1)):
			r.t.Errorf("backend %d got message %d after %d, want them in order", i, at, last)
		case at > next && !may(next, at):
			r.t.Errorf("backend %d got message %d, want %d: it is missing", i, at, next)
		case at < next:
			repeats++
		}
		last, next = at, max(next, at+1)
	}
	if repeats > p.told.Replayed {
		r.t.Errorf("backend %d got %d repeats, want at most the %d it was told of", i, repeats, p.told.Replayed)
	}
	return next
}

// wantOnce checks that no message is written whole to two backends and, but
// under off, that none is left out.
func (r *rig) wantOnce(want promise, index map[string]int, i int, written []string, wrote int) int {
	r.t.Helper()
	for k, m := range written {
		at, known := index[m]
		switch {
		case !known:
			r.t.Errorf("%v: backend %d got message %d as %.40q, which was never sent", want.mode, i, k, m)
			return wrote
		case at < wrote:
			r.t.Errorf("%v: backend %d got message %d again", want.mode, i, at)
		case at > wrote && want.mode != replay.Off:
			r.t.Errorf("%v: backend %d got message %d, want %d: it is missing", want.mode, i, at, wrote)
		}
		wrote = max(wrote, at+1)
	}
	return wrote
}

// wantPassed checks what the client got of the backends' messages: of each a run
// from its first one on, whole, one backend after the other. A message of which
// only a part came must have ended the session.
func (r *rig) wantPassed() {
	r.t.Helper()
	wantLegal(r.t, "to the client", r.client)
	got, _ := r.client.messages()
	for i, p := range r.used() {
		p.mu.Lock()
		sent, _ := wholeMessages(p.sent)
		p.mu.Unlock()
		n := 0
		for n < min(len(got), len(sent)) && got[n] == sent[n] {
			n++
		}
		if got = got[n:]; i == len(r.used())-1 && r.live() && n < len(sent) && !p.conn.closed() {
			r.t.Errorf("got %d messages of %d of the last backend, want all while the session lives", n, len(sent))
		}
	}
	if len(got) > 0 {
		r.t.Errorf("got %.60q, and %d more messages, that no backend sent there", got[0], len(got)-1)
	}
	frames := r.client.received()
	last := slices.IndexFunc(frames, func(f arrival) bool { return f.head.OpCode == ws.OpClose })
	if last < 0 {
		last = len(frames)
	}
	frames = slices.DeleteFunc(slices.Clone(frames[:last]), func(f arrival) bool { return f.head.OpCode.IsControl() })
	if n := len(frames); n > 0 && !frames[n-1].head.Fin && r.rec.State() == registry.Held {
		r.t.Error("got a part of a message and the client held, want it told")
	}
}

// arrival is got, where a variable has that name.
type arrival = got

// wantPonged checks that each of the client's pings was answered once, or, if
// the session ended, at most once.
func (r *rig) wantPonged(pings []string) {
	r.t.Helper()
	wantPonged(r.t, r.client, pings, r.rec.State() != registry.Closed && r.rec.State() != registry.Closing)
}

func wantPonged(t *testing.T, p *peer, pings []string, all bool) {
	t.Helper()
	answers := map[string]int{}
	for _, f := range p.received() {
		if f.head.OpCode == ws.OpPong {
			answers[string(f.payload)]++
		}
	}
	var missing []string
	for _, ping := range pings {
		n := answers[ping]
		delete(answers, ping)
		if n > 1 {
			t.Errorf("got ping %.20q answered %d times, want once", ping, n)
		}
		if n == 0 && all {
			missing = append(missing, ping)
		}
	}
	if len(missing) > 0 {
		t.Errorf("got no answer to the pings %.200s, want one to each of %d", strings.Join(missing, ", "), len(pings))
	}
	for payload := range answers {
		t.Errorf("got a pong %.20q, for which nobody asked", payload)
	}
}
