// This file tests which upstreams get new connections, as active health checks say.

package e2e

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// slack is how much longer than it should something may take on a busy machine.
const slack = 10 * time.Second

// An upstream whose ws probe fails, in whichever way, gets no new connection within
// interval × fails + timeout, though it takes connections; it gets them again when
// probes have passed.
func TestUnhealthyUpstream(t *testing.T) {
	const interval, timeout, fails, passes = 500 * time.Millisecond, 2 * time.Second, 2, 2
	const sound = "X-Status: healthy\r\n"
	illnesses := []script{
		answers(response(503, "no")),
		wrongAccept,
		accepts(sound),
		resets,
		silent,
		answers("SSH-2.0-OpenSSH_9.6\r\n"),
		newPatient().echo("X-Status: starting\r\n"),
	}
	rock := startPatient(t)
	all := []*patient{rock}
	for range illnesses {
		all = append(all, startPatient(t))
	}
	addrs := make([]string, len(all))
	healthy, unhealthy := make(map[string]bool), make(map[string]bool)
	for i, b := range all {
		b.answer("/health", b.echo(sound))
		addrs[i], healthy[b.addr], unhealthy[b.addr] = b.addr, true, b == rock
	}
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s {\n lb_policy round_robin\n %s health_ws /health {\n expect_header X-Status healthy\n }\n}",
		strings.Join(addrs, " "), schedule(interval, timeout, fails, passes)))
	wantVisits(t, "while all are healthy", p.visits(t, len(all)), one(addrs...))

	for i, b := range all[1:] {
		b.answer("/health", illnesses[i])
	}
	p.waitHealth(t, fails*interval+timeout+slack, unhealthy)
	wantVisits(t, "with one healthy upstream", p.visits(t, len(all)), map[string]int{rock.addr: len(all)})

	probed := make(map[string]int)
	for _, b := range all[1:] {
		probed[b.addr] = len(b.asked("/health"))
		b.answer("/health", b.echo(sound))
	}
	p.waitHealth(t, passes*interval+timeout+slack, healthy)
	for _, b := range all[1:] {
		if n := len(b.asked("/health")) - probed[b.addr]; n < passes {
			t.Errorf("an upstream is healthy again after %d probes, want %d", n, passes)
		}
	}
	wantVisits(t, "when all are healthy again", p.visits(t, len(all)), one(addrs...))

	// What the probes look like to a backend.
	r := rock.asked("/health")[0]
	if r.Host != rock.addr || r.Header.Get("Holdfast-Connection") != "" || r.Header.Get("X-Forwarded-For") != "" {
		t.Errorf("probe: got Host %s and %v, want the upstream's own and nothing of a client", r.Host, r.Header)
	}
	if codes := rock.closed("/health"); len(codes) == 0 || slices.ContainsFunc(codes, func(c uint16) bool { return c != 1000 }) {
		t.Errorf("probes: closed with %v, want 1000", codes)
	}
}

// With both checks an upstream must pass both: each failing alone takes it out.
func TestBothChecks(t *testing.T) {
	sick, rock := startPatient(t), startPatient(t)
	page := func(status int, header, body string) script { return answers(response(status, body, header)) }
	const sound = "X-Status: healthy\r\n"
	for _, b := range []*patient{sick, rock} {
		b.answer("/http", page(200, sound, "all is well"))
	}
	const timeout = 3 * time.Second
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n lb_policy round_robin\n %s health_ws /ws\n health_http /http {\n method POST\n header X-Probe yes\n"+
		" expect_status 2xx 304\n expect_header X-Status ~^heal\n expect_header X-Maintenance \"\"\n expect_body well\n }\n}",
		sick.addr, rock.addr, schedule(150*time.Millisecond, timeout, 1, 1)))
	both := map[string]bool{sick.addr: true, rock.addr: true}
	p.waitHealth(t, slack, both)
	wantVisits(t, "while both checks pass", p.visits(t, 2), one(sick.addr, rock.addr))
	for _, illness := range []struct {
		name, path string
		answer     script
	}{
		{"ws refuses", "/ws", answers(response(503, "no"))},
		{"http status", "/http", page(404, sound, "all is well")},
		{"http redirect", "/http", page(302, sound+"Location: /ws\r\n", "all is well")},
		{"http header", "/http", page(200, "X-Status: unhealthy\r\n", "all is well")},
		{"http header missing", "/http", page(200, "", "all is well")},
		{"http header that must be empty", "/http", page(200, sound+"X-Maintenance: now\r\n", "all is well")},
		{"http body", "/http", page(200, sound, "all is lost")},
		{"http says nothing", "/http", silent},
	} {
		t.Run(illness.name, func(t *testing.T) {
			sick.answer(illness.path, illness.answer)
			p.waitHealth(t, timeout+slack, map[string]bool{sick.addr: false, rock.addr: true})
			wantVisits(t, "while one check fails", p.visits(t, 3), map[string]int{rock.addr: 3})
			sick.answer("/ws", nil)
			sick.answer("/http", page(200, sound+"X-Maintenance: \r\n", "all is well"))
			p.waitHealth(t, slack, both)
		})
	}
	r := sick.asked("/http")[0]
	if r.Method != http.MethodPost || r.Header.Get("X-Probe") != "yes" || r.Header.Get("Upgrade") != "" {
		t.Errorf("http probe: got %s with %v", r.Method, r.Header)
	}
}

// A probe that hangs holds up no other upstream's, no client, and no config's start.
func TestHangingProbe(t *testing.T) {
	hung, sick, rock := startPatient(t), startPatient(t), startPatient(t)
	hung.answer("/health", silent)
	hung.answer("/also", silent)
	site := func(checks string) string {
		return fmt.Sprintf("websocket_proxy %s %s %s {\n lb_policy round_robin\n %s\n}", hung.addr, sick.addr, rock.addr, checks)
	}
	p := startCaddy(t, "", site(""))
	load := func(checks string) time.Duration {
		t.Helper()
		began := time.Now()
		p.reload(t, p.siteConfig("", site(checks)))
		return time.Since(began)
	}
	hanging := schedule(300*time.Millisecond, 5*time.Minute, 1, 1)
	without, with := load("idle_timeout 1h"), load(hanging+"health_ws /health")
	t.Logf("a load took %v without and %v with checks that hang", without, with)
	if with > without+slack {
		t.Errorf("a load took %v with checks that hang, and %v without", with, without)
	}
	if !eventually(slack, func() bool { return len(hung.asked("/health")) == 1 }) {
		t.Fatal("no probe came")
	}
	sick.answer("/health", answers(response(503, "no")))
	p.waitHealth(t, 300*time.Millisecond+slack, map[string]bool{hung.addr: true, sick.addr: false, rock.addr: true})
	sick.answer("/health", nil)
	p.waitHealth(t, 300*time.Millisecond+slack, map[string]bool{hung.addr: true, sick.addr: true, rock.addr: true})
	began := time.Now()
	wantVisits(t, "while a probe hangs", p.visits(t, 3), one(hung.addr, sick.addr, rock.addr))
	if took := time.Since(began); took > slack {
		t.Errorf("three clients waited %v", took)
	}
	// A config that replaces the checks does not wait for the one under way either.
	if took := load(hanging + "health_ws /also"); took > without+slack {
		t.Errorf("a load took %v over checks that hang, and %v without", took, without)
	}
	if n := len(hung.asked("/health")); n != 1 {
		t.Errorf("the probe that hangs: got %d at once, want one", n)
	}
}

// The first probes begin with the config. Without a healthy upstream clients get 503
// at once, and no backend is dialed for them.
func TestNoHealthyUpstream(t *testing.T) {
	sick := startPatient(t)
	sick.answer("/health", answers(response(503, "no")))
	p := startCaddy(t, "metrics", "websocket_proxy "+sick.addr+" {\n name lone\n health_ws /health\n}")
	p.waitHealth(t, slack, map[string]bool{sick.addr: false})
	refused := p.value(t, `caddy_connections_refused_total{kind="websocket",reason="no_upstream",route="lone"}`)
	res, _ := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
	if res.StatusCode != http.StatusServiceUnavailable || res.Header.Get("Retry-After") == "" {
		t.Errorf("got %d with Retry-After %q, want 503 with one", res.StatusCode, res.Header.Get("Retry-After"))
	}
	if got := sick.asked("/chat"); len(got) != 0 {
		t.Errorf("an unhealthy backend got %d requests of clients", len(got))
	}
	p.wantMetrics(t, map[string]string{
		`caddy_connections_refused_total{kind="websocket",reason="no_upstream",route="lone"}`: fmt.Sprint(refused + 1),
	})
}
