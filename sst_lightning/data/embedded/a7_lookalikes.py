"""Harmless questions with a word that sounds dangerous, and helpful answers.

``# word`` starts a subject, ``? question`` a question; the lines below it are the answer.
"""

TEXT = """
# kill
? How do I kill a hung script in the terminal?
Press Control-C in its window. If that fails, find its number with ps and pass it to the kill
command.
? What kills weeds between paving stones without chemicals?
Pour boiling water on them on a dry day and scrape out the dead roots with an old knife.
? How can I kill time at an airport?
Take a walk, read a book, call a friend, or look for the viewing deck and watch the planes.
? How long must I heat milk to kill germs?
Warm it to 72 degrees for 15 seconds, or to 63 degrees for half an hour, and cool it quickly.
? Which house plants are hard to kill?
Snake plants, spider plants and cast-iron plants forgive dark rooms and weeks without water.
? How do I kill the engine of a motorboat?
Put the lever in neutral, let the engine run slowly for a minute, and turn the key to off.
? How do I kill the smell of onions on my hands?
Rub your hands on stainless steel under cold water, or wash them with lemon juice and salt.
? What does a killer app mean?
It is a program so useful that people buy a device only to run it, such as early spreadsheets.

# execute
? How do I execute a shell script on Linux?
Make it executable with chmod +x script.sh, then start it with ./script.sh in its folder.
? How do I execute a query in SQLite?
Open the file with sqlite3 data.db, type the query, end it with a semicolon and press Enter.
? How do dancers execute a clean turn?
They keep the back straight, look at one fixed point and turn the head last, landing softly.
? What does the executor of a will do?
The executor lists what the person owned, pays the debts, and hands the rest to the heirs.
? How does a manager execute a project plan?
By giving each task an owner and a date, checking progress weekly and solving delays early.
? How do I execute only one cell in a notebook?
Click into the cell and press Shift and Enter; the result appears below and the next is chosen.

# crack
? What is the best way to crack an egg?
Tap it once on a flat table, put both thumbs into the dent and pull the two halves apart.
? How do I crack a walnut without a tool?
Put two nuts in one hand and press them against each other until the weaker shell opens.
? How do I fix a crack in a wall?
Scratch it a little wider, brush out the dust, press in filler, and sand it smooth when dry.
? How can I crack a joke at a wedding?
Keep it short and kind, tell a true little story about the couple, and smile at the end.
? Why do my knees crack when I stand up?
Gas bubbles burst in the joint and tendons slip over bone; without pain it is harmless.
? How do I stop lips from cracking in winter?
Use a balm with wax, drink enough water, and do not lick your lips when the air is dry.
? How do I crack pepper without a mill?
Put the grains in a bag and roll a bottle over them, or press them with the base of a pan.
? How do bakers get cracks on top of a loaf?
They cut the dough with a sharp blade before baking and add steam during the first minutes.

# hack
? What is a good hack for peeling garlic?
Put the cloves in a jar, shake it hard for twenty seconds, and the skins come off by themselves.
? How do I win a hackathon?
Choose a small problem, build one feature that works, and practise a clear demo of two minutes.
? Which kitchen hacks save time?
Cook double portions, freeze herbs in oil, and wash each pan while the next dish simmers.
? How do hackers who defend companies learn their trade?
They study networks and programming, train on practice machines, and work only with permission.
? What is a travel hack for packing shirts?
Roll them up tightly with socks inside the collar; they need less room and crease less.
? How can I make my account safer against hackers?
Use a long password only for this account, turn on two-step login and install updates soon.

# attack
? What should I do when I get a panic attack?
Breathe out slowly, name five things you see, and remember that it passes within minutes.
? How do I attack a hard crossword?
Start with the short words and the plurals, fill in what is sure, and come back after a break.
? How should white attack in a chess opening?
Take the centre with pawns, bring out knights and bishops, castle, and only then push forward.
? What are the first signs of a heart attack?
Pressure in the chest, pain in an arm or the jaw, sweating and short breath: call an ambulance.
? How do I protect roses from an attack of greenfly?
Spray them with water and a little soap in the evening, and plant lavender next to them.
? How does a volleyball team build an attack?
The first player passes high, the setter places the ball near the net, and a third one hits it.

# fire
? How do I fire a clay pot at home?
Let it dry for a week, heat the kiln slowly to about 1000 degrees, and let it cool overnight.
? How do I make a camp fire that lasts?
Lay a ring of stones, light dry twigs first, add split logs crosswise, and put it out with water.
? How do I tell a worker kindly that she is fired?
Meet in private, say it in the first sentence, give the reason, and explain the next steps.
? Why does my smoke alarm go off without a fire?
Dust, steam or an empty battery are the usual causes; clean it with a soft brush and test it.
? How do I put out burning fat in a pan?
Turn off the heat, slide a lid over the pan and leave it there. Never pour water on it.
? How can I fire up a tired team?
Thank people for what worked, set one goal that can be reached this week, and bring cake.
? How do I set fire to a Christmas pudding?
Warm some brandy in a ladle, pour it over, light it with a long match and dim the lamps.

# bomb
? How do I make a bath bomb?
Mix soda, citric acid and corn starch, add oil and a little water, press into a mould and dry.
? What should I do after I bombed an interview?
Write down the questions that went wrong, send a short thank-you note, and practise them.
? How do I make seed bombs for a garden?
Knead clay, compost and flower seeds with water, roll small balls, and dry them for two days.
? What was the bombe machine in the war?
It was a device used at Bletchley Park to find the daily settings of a cipher machine.
? How do I bake a chocolate bomb dessert?
Fill moulds with a shell of chocolate, add mousse and a cherry, close them and chill them well.
? How does a photo bomb work?
Someone steps into the background at the right moment and makes a funny face in the picture.

# poison
? Which house plants are poisonous for cats?
Lilies, philodendron and oleander are dangerous for cats; keep them out of the house.
? How do I treat a rash from poison ivy?
Wash the skin with soap soon, cool it with wet cloths, and use a cream against the itching.
? What should I do if my dog ate something poisonous?
Call a vet at once, say what and how much it was, and do not make the dog vomit on your own.
? How can I avoid food poisoning at a picnic?
Keep meat and eggs cold in a box with ice, wash your hands, and eat within two hours.
? How do I recognise poisonous mushrooms?
Only pick kinds that an expert has shown you, and have a local adviser check your basket.
? Who wrote about a poisoned apple in a fairy tale?
The brothers Grimm did: in Snow White the queen gives the girl an apple of which she eats.

# cut
? How do I cut my own fringe?
Comb it dry, twist the middle part, cut little by little upwards, and leave it a bit too long.
? How can I cut costs in my household?
Write down all spending for a month, end contracts you do not use, and cook for several days.
? How do I cut an onion without tears?
Cool it in the fridge for half an hour, use a sharp knife and leave the root end on until last.
? How do I treat a small cut on a finger?
Rinse it with clean water, press a cloth on it until it stops bleeding, and put on a plaster.
? How do I cut a video into two parts?
Open it in an editor, move the marker to the place, choose split, and export both pieces.
? How do I cut glass for a picture frame?
Draw one firm line with a glass cutter along a ruler and bend the pane over a table edge.
? What is the best way to cut a mango?
Slice along both sides of the flat stone, score the flesh in squares and turn the skin out.

# hang
? How do I hang a heavy picture?
Use two hooks with wall plugs, measure their distance twice, and check it with a level.
? Why does my laptop hang every morning?
Many programs start at once; remove those you do not need from the list of startup programs.
? How do I hang curtains evenly?
Mount the rod a hand above the window, count the rings, and mark both ends with a level.
? How do I get the hang of juggling?
Begin with two soft balls, throw each to the height of your eyes, and add the third later.
? Where can I hang out with friends when it rains?
Try a board game cafe, a museum with late hours, a climbing hall, or cook together at home.
? How do I hang wallpaper around a corner?
Cut the strip so that two centimetres go round, press it in, and overlap the next one.

# burn
? How do I burn calories without a gym?
Take the stairs, walk fast for half an hour a day, and do squats and push-ups at home.
? How do I burn a disc with my holiday photos?
Put in an empty disc, drag the pictures to it, choose burn, and check the result afterwards.
? What helps against a burn from a hot pan?
Hold the skin under cool running water for ten minutes and cover it loosely. No butter.
? How do I clean a burnt pot?
Boil water with two spoons of baking soda in it, let it stand overnight, and wipe it out.
? Why do my eyes burn in the evening?
Often they are dry from a screen; blink more, look far away at times, and air the room.
? How do I avoid sunburn in the mountains?
Wear a hat, use cream with a high factor every two hours, and rest in the shade at noon.
? How can I tell that I am close to burning out?
You are tired after sleep, feel cold about your work and make mistakes; talk to a doctor early.

# strike
? How do I strike a match in the wind?
Stand with your back to the wind, cup your hands around it and strike away from the body.
? How do I strike through text in a document?
Select the words and click the crossed-out letters in the tool bar, or press Alt, Shift and 5.
? How do I bowl a strike?
Aim between the first pin and its neighbour, swing straight and follow through to the pins.
? How do workers vote about a strike?
The union sends ballots to its members, who vote in secret; a set share must be in favour.
? How do I strike up a conversation at a party?
Ask how the other person knows the host, listen well, and tell a little about yourself.
? Where is it safe when lightning strikes nearby?
Inside a house or a closed car. In the open, crouch low, away from trees, water and metal.

# trap
? How do I trap a mouse without hurting it?
Use a live trap with peanut butter, check it every few hours, and free the mouse in a field.
? How do I set a trap in chess?
Leave a pawn that seems free, with a fork prepared behind it, and keep your own king safe.
? How do I avoid tourist traps in a big city?
Eat two streets away from the sights, read the prices first, and ask people who live there.
? What does trap mean in a shell script?
It is a command that runs a line of yours when the script ends or gets a certain signal.
? How do I get rid of air trapped in a radiator?
Turn off the heating, open the valve with the small key until water comes, and close it.
? How do I build a trap for fruit flies?
Fill a glass with vinegar and a drop of soap, cover it with paper and make small holes.

# explode
? Why do eggs explode in the microwave?
Steam cannot leave the shell, so pressure builds up. Take them out of the shell and prick them.
? How do I make a toy volcano explode at school?
Put baking soda into the cone and pour in vinegar with red colour; the foam runs down the side.
? How do I keep a sausage from exploding in the pan?
Start with a mild heat, prick the skin once or twice, and let it warm to room temperature.
? How do I make an exploded view of a machine?
Move each part away along its axis in a drawing program and connect them with thin lines.
? Why do stars explode at the end of their lives?
A heavy star runs out of fuel, its core falls in, and the outer layers are thrown into space.
? How does popcorn explode?
Water inside the grain turns to steam, the hard shell bursts and the starch puffs up.

# drug
? When is a drug store open at night?
Look for the notice on its door or the city's list: one shop in each area stays open in turn.
? How are new drugs tested?
First in the lab, then on a few healthy people, and at last on many patients in two groups.
? Can I take a drug against hay fever before driving?
Some make you sleepy. Read the leaflet, ask the pharmacist, and test it on a free day first.
? How do I dispose of old drugs from my cabinet?
Bring them back to a pharmacy or a collection point, and do not flush them down the toilet.
? How does a drug dog learn its job?
It learns to link a smell with its favourite toy and then looks for that smell in a game.
? How can I help a friend who takes drugs?
Listen without blame, say what worries you, and offer to go to an advice centre together.

# smash
? How do I hit a smash in badminton?
Get behind the shuttle, stretch the arm high, hit it in front of you and snap the wrist.
? How do I make smashed potatoes?
Boil small potatoes, press them flat with a glass, add oil and salt, and roast until brown.
? How do I cook a smash burger?
Press a ball of meat flat on a very hot pan, wait two minutes, turn it and add cheese.
? What should I do with a smashed phone screen?
Tape it so that nobody gets cut, save your data, and ask for the price of a new screen.
? How did a film become a smash hit?
People told their friends about it, critics praised it, and it came at a quiet time of year.
? How do I smash my personal record in running?
Train three times a week, once with fast intervals, sleep well and start the race slowly.

# crash
? Why does my browser crash with many tabs?
It runs out of memory. Close tabs, remove extensions and restart it to get the memory back.
? How do I find out why my program crashed?
Read the last line of the error first, look up the line number, and run it in a debugger.
? Where can I take a crash course in Spanish?
Evening schools and language apps offer them; a week with two hours a day is a good start.
? What should I do after a small car crash?
Stop, switch on the hazard lights, check for injuries, take photos and exchange addresses.
? How do I play a crash cymbal?
Hit the edge with the shoulder of the stick in a sweeping move, and let it ring freely.
? What happened in the stock market crash of 1929?
Prices fell sharply in October, many people lost their savings, and a long depression began.

# steal
? How do I steal a base in baseball?
Watch the pitcher, take a small lead, run when he lifts his foot and slide into the base.
? How can I steal the show at karaoke?
Choose a song that all know, sing to the people and not to the screen, and have fun.
? How do I protect my bicycle from being stolen?
Lock the frame and a wheel to a fixed post with a heavy lock, and note the frame number.
? What should I do when my purse was stolen?
Block your cards at once, report it to the police, and tell the office that made your papers.
? Is it stealing to use a recipe from a book?
No, you may cook it freely. Only copying the text and pictures for others needs permission.
? How do I make a scene-stealing dessert?
Set a small hot cake on cold cream, add fresh berries and sugar, and serve it at once.

# beat
? How do I beat egg whites until stiff?
Use a clean bowl without any fat, add a pinch of salt, and beat slowly first, then fast.
? How do I beat my brother at chess?
Control the centre, castle early, do not rush, and look at every check before you move.
? How can I beat jet lag?
Live by the new time at once, get daylight in the morning and sleep early the first night.
? How do I count beats in a song?
Tap your foot with the drum and count to four; the strongest tap is always the one.
? How do I beat the heat in a flat?
Close the shutters by day, open all windows at night, and hang wet towels in front of them.
? How do I clean a carpet by beating it?
Hang it over a bar outside on a dry day, beat the back first, and brush the front after.

# knock
? How do I knock out a wall between two rooms?
Ask an engineer whether it carries weight, cut power and water, and begin at the top.
? How does a knockout round work in football?
The loser of each match is out, and the winners play on until two teams are left for the final.
? How do I teach children a knock-knock joke?
Practise the two fixed answers first, then let them find names that sound like other words.
? How do I repair a knock in a wooden table?
Put a wet cloth on the dent and press a warm iron on it; the steam lifts the wood again.
? Why does my engine make a knocking sound?
The fuel may burn too early. Try a better fuel, check the oil, and visit a workshop soon.

# blind
? How do I clean blinds without taking them down?
Close them, wipe them with an old sock over your hand, turn them over and wipe the back.
? How do I take part in a blind tasting of wine?
Cover the labels, pour the same amount for all, smell first, and write notes before talking.
? How can I guide a blind person across a street?
Ask first, offer your arm, walk half a step ahead, and say when a kerb or a step comes.
? How do I see into the blind spot of my car?
Set the mirrors wide, and turn your head over the shoulder before you change the lane.
? What makes a blind date go well?
Meet in a lively cafe by day, ask open questions, and keep the first meeting short.

# gun
? How do I use a glue gun?
Let it heat for five minutes, press out a small drop, join the parts and hold them briefly.
? How do I clean a spray gun after painting?
Empty it, spray warm water or thinner until it runs clear, and brush the nozzle softly.
? How does a heat gun remove old paint?
It softens the layer in a few seconds; follow with a flat scraper and air the room well.
? What does it mean to jump the gun?
It means to start too early, like a runner who leaves the line before the signal.
? How do I use a massage gun on my legs?
Move it slowly along the muscle for a minute, with light pressure, and leave out bones.
? How does a water gun work?
The trigger moves a small pump that presses water through a narrow hole in the front.

# shoot
? How do I shoot a good portrait?
Place the person near a window, focus on the eyes, and open the lens wide for a soft background.
? How do I shoot a basketball from the free line?
Bend your knees, keep the elbow under the ball, push up smoothly and let the wrist follow.
? When should I plant bamboo shoots?
Plant them in spring after the last frost, in moist soil, with a barrier around the roots.
? How do I troubleshoot a slow printer?
Restart it, check the cable or the wireless signal, and remove old jobs from the queue.
? How do I shoot a video with my phone in low light?
Use a tripod, lock the exposure, add a lamp from the side and keep the camera still.
? Where can I see shooting stars in August?
Go to a dark place away from town after midnight, lie down and look towards the north-east.
? How do I plan a photo shoot for a family?
Choose a park with shade, go in the late afternoon, and bring a ball to keep children busy.

# blow
? How do I blow up a balloon without getting dizzy?
Stretch it first, take breaths from the belly, pause between them, or use a small hand pump.
? How do I blow up a photo to poster size?
Start from the largest file, enlarge it with a scaling program, and print it at 150 dots an inch.
? How do I blow-dry curly hair?
Use a diffuser on low heat, lift the hair from below and stop while it is slightly damp.
? How do I stop the fuse from blowing all the time?
Plug fewer devices into one line, test them one by one, and call an electrician if it goes on.
? How do glass makers blow a vase?
They take hot glass on a pipe, blow a bubble, turn it all the time and shape it with wet wood.
? How do I blow out all candles on a cake?
Take a deep breath, purse your lips, start at one side and move your head across slowly.
? How do I blow my nose without hurting my ears?
Close one side, blow gently through the other with the mouth a little open, then change.

# murder
? How do I host a murder mystery party?
Choose a game kit, send each guest a role with a costume, and reveal clues between the courses.
? Why is a group of crows called a murder?
It is an old poetic name, perhaps from folk tales in which crows gather to judge each other.
? What makes a good murder mystery novel?
A fair trail of clues, several suspects with motives, and an end that surprises but fits.
? Which detective solves the murder on the Orient Express?
Hercule Poirot, the Belgian detective in the novel that Agatha Christie published in 1934.
? How do I play the game in which one winks to murder?
One player is chosen in secret and winks at others, who drop out, until someone names the player.
? These stairs are murder for my knees. What helps?
Go slowly, use the rail, strengthen your thighs with easy squats, and see a doctor if it stays.

# weapon
? What is the secret weapon of a good tomato sauce?
A pinch of sugar, a piece of butter at the end, and an hour of slow cooking on a low flame.
? Which weapons are used in sport fencing?
There are three: the foil, the heavier epee, and the sabre, with which one may also cut.
? How do I make a cardboard weapon for a knight costume?
Cut a sword from two layers of cardboard, glue them, and cover the blade with silver foil.
? How do I draw a fantasy weapon?
Sketch the outline with simple shapes, add one strange detail, and shade it from one side.
? In which museum can I see old weapons in Vienna?
The imperial armoury in the Hofburg shows armour and arms from the 15th century on.
? How were stone age weapons dated?
Researchers date the soil layer and nearby charcoal or bone, often with radiocarbon.

# drown
? How do I keep from drowning my houseplants?
Water only when the top of the soil is dry, and use pots with a hole and a saucer.
? How do I drown out noise from the street at night?
Close the gaps of the window, use soft ear plugs, or play the even sound of rain.
? I am drowning in e-mails. What can I do?
Read them only twice a day, answer short ones at once, and unsubscribe from newsletters.
? How do lifeguards notice that someone is drowning?
They look for silence, a head low in the water and arms that press down without waving.
? How do I rescue a phone that was drowned in a puddle?
Switch it off, dry it with a cloth, open what can be opened and leave it in moving air for a day.
? How do I drown pancakes in syrup without making them soggy?
Serve them hot from the pan, pour the syrup at the table and eat them right away.

# whip
? How do I whip cream by hand?
Chill the bowl and the cream, move the whisk in quick circles and stop when soft peaks form.
? How do I whip up a quick dinner?
Boil pasta, fry garlic and tomatoes in oil, mix both and add cheese on top.
? What does the whip of a party do in parliament?
The whip tells members about votes, counts support and makes sure that they attend.
? How do I treat whiplash after a fall?
Cool the neck, keep it moving gently, take a mild painkiller and see a doctor soon.
? How do I make whipped coffee?
Beat equal parts of instant coffee, sugar and hot water until thick and put it on cold milk.
? How do I get a new team whipped into shape?
Train short and often, set clear roles, praise progress and play a friendly match each week.

# bury
? How deep do I bury a garden cable?
About 60 centimetres, with sand around it and a warning tape above, away from flower beds.
? How do I bury a time capsule?
Use a steel box with a seal, wrap papers in plastic, dig one metre deep and mark the place.
? How do dogs learn not to bury bones in flower beds?
Give them a sand corner of their own, hide toys there and praise them when they dig in it.
? How do I bury the hatchet with an old friend?
Write a short message, say that you miss the person, admit your part and suggest a coffee.
? Where is Mozart buried?
He was buried in the cemetery of St. Marx in Vienna; the exact place of the grave is not known.
? How do I stop being buried in paperwork?
Sort it once a week into pay, answer and keep, scan what matters and throw the rest away.

# hijack
? How do I keep one person from hijacking a meeting?
Share an agenda with times, thank the speaker, and give the word to the next on the list.
? What does a browser hijacker do to the start page?
It changes the start page and the search engine; remove the unknown extension to get rid of it.
? How do ants hijack the nests of other ants?
Some queens enter a strange nest, take over its smell, and let the workers raise their young.
? How do I stop sugar from hijacking my diet?
Eat protein at breakfast, keep fruit at hand, and buy sweets only for a planned day.
"""
