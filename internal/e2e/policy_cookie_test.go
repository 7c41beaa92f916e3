// This file tests the policy that tells the client by a cookie where it was.

package e2e

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// The cookie comes with the 101 itself. Who comes back with it gets the same backend
// and no other cookie; if that is gone another one, and its cookie.
func TestPolicyCookie(t *testing.T) {
	const browsers = 100
	posts := startPosts(t, 3)
	p := startCaddy(t, "", policySites(posts, map[string]string{"cookie": "cookie which secret {\n max_age 1h\n }"}))
	fresh := func(int) visitor { return visitor{target: "/cookie"} }

	// cookieOf returns the cookie that a client was given.
	cookieOf := func(v *visitor) *http.Cookie {
		t.Helper()
		if len(v.cookies) != 1 || v.cookies[0].Name != "which" || v.cookies[0].Value == "" {
			t.Fatalf("cookies: got %v, want one named which", v.cookies)
		}
		return v.cookies[0]
	}
	// returning are clients that come back with the cookies of others.
	returning := func(before visitors) func(i int) visitor {
		return func(i int) visitor {
			return visitor{target: "/cookie", header: "Cookie: a=b; which=" + cookieOf(before[i%len(before)]).Value + "\r\n"}
		}
	}
	first := p.visit(t, browsers, fresh)
	values := make(map[string]string) // of cookies, by backend
	for _, v := range first {
		c := cookieOf(v)
		if c.Path != "/" || !c.HttpOnly || c.MaxAge != 3600 || c.SameSite != http.SameSiteLaxMode || c.Secure {
			t.Errorf("cookie: got %v", c)
		}
		if known := values[v.backend]; known != "" && known != c.Value || strings.Contains(c.Value, v.backend) {
			t.Errorf("cookie of %s: got %q, want what the others have, and no address", v.backend, c.Value)
		}
		values[v.backend] = c.Value
	}
	if len(values) != len(posts) {
		t.Fatalf("backends: got %d of %d", len(values), len(posts))
	}
	sameAs := func(what string, now, before visitors) {
		t.Helper()
		for i, v := range now {
			if want := before[i%len(before)].backend; v.backend != want || len(v.cookies) != 0 {
				t.Errorf("%s, client %d: got %s and cookies %v, want %s and none", what, i, v.backend, v.cookies, want)
				return
			}
		}
	}
	sameAs("back again", p.visit(t, crowdSize-browsers, returning(first)), first)

	posts[1].leave()
	lost := slices.DeleteFunc(slices.Clone(first), func(v *visitor) bool { return v.backend != posts[1].addr })
	second := p.visit(t, browsers, returning(lost))
	for i, n := range second.by(posts) {
		if (i == 1) != (n == 0) {
			t.Errorf("connections of upstream %d: got %d", i+1, n)
		}
	}
	for i, v := range second {
		if c := cookieOf(v); c.Value != values[v.backend] {
			t.Fatalf("client %d: got another cookie than that of its new backend", i)
		}
	}
	sameAs("with the new cookie", p.visit(t, browsers, returning(second)), second)
	posts[1].come(t)
	sameAs("with the new cookie, when the old backend is back", p.visit(t, browsers, returning(second)), second)
	sameAs("with the old cookie, when its backend is back", p.visit(t, browsers, returning(lost)), lost)
}

// A browser that reconnects comes to the same backend, until that is gone.
func TestPolicyCookieInBrowser(t *testing.T) {
	posts := startPosts(t, 3)
	g := browserGuest{nodeGuest{startNode(t, "browser.cjs", tool(t, "chromium"))}}
	p := startCaddy(t, "", policySites(posts, map[string]string{"cookie": "cookie"})+page)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if err := g.visit(ctx, p); err != nil {
		t.Fatal(err)
	}
	connect := func() (upstream string) {
		t.Helper()
		if _, err := g.open(ctx, target{URL: "ws://" + p.addr + "/cookie"}); err != nil {
			t.Fatal(err)
		}
		upstream = p.connections(t)[0].Upstream
		if _, err := g.close(ctx, ending{Code: 1000}); err != nil {
			t.Fatal(err)
		}
		p.waitEmpty(t)
		return upstream
	}
	// stays returns where the browser is, ten times in a row.
	stays := func() (upstream string) {
		t.Helper()
		upstream = connect()
		for n := range 10 {
			if got := connect(); got != upstream {
				t.Fatalf("reconnect %d: got %s, want %s again", n, got, upstream)
			}
		}
		return upstream
	}
	home := stays()
	for _, b := range posts {
		if b.addr == home {
			b.leave()
		}
	}
	if next := stays(); next == home {
		t.Errorf("upstream: got %s, which is gone", next)
	}
}
